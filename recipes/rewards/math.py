"""Mathematical equality, by the math-verify library."""

from __future__ import annotations

from recipes.rewards.graders.worker import GraderSpec

MATH = GraderSpec(
    function="recipes.rewards.math:math_match",
    sample=(r"$\boxed{\frac{x^2+2x+1}{2}}$", r"$\frac{(x+1)^2}{2}$"),
)
"""`math_match` beside a run. The sample makes the library import what algebra needs."""


def math_match(reply: str, answer: str) -> float:
    """1.0 if the last mathematical expression of the reply equals the answer, else 0.0.

    Where one of them holds no expression at all, the texts are compared. It may take forever on
    what a model wrote: runs call it through `pool.GraderPool`, which ends it. The library's own
    limits are off: they are of the clock, and need the main thread's signals.
    """
    # A second to import: only tasks that grade mathematics pay for it.
    from math_verify import parse, verify

    gold = parse(answer, parsing_timeout=None)
    guess = parse(reply, parsing_timeout=None)
    if not gold or not guess:
        return float(reply.strip() == answer.strip())
    return float(verify(gold, guess, timeout_seconds=None))
