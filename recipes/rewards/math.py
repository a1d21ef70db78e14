"""Mathematical equality, by the math-verify library."""

from __future__ import annotations


def math_match(reply: str, answer: str) -> float:
    """1.0 if the last mathematical expression of the reply equals the answer, else 0.0.

    Where one of them holds no expression at all, the texts are compared. The library bounds its
    own time (5 s an expression) by a signal, so call this from the main thread.
    """
    # A second to import: only tasks that grade mathematics pay for it.
    from math_verify import parse, verify

    gold = parse(answer)
    guess = parse(reply)
    if not gold or not guess:
        return float(reply.strip() == answer.strip())
    return float(verify(gold, guess))
