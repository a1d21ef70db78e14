"""From the rewards of replies to the figures of a set. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one problem, whose replies were graded, 1.0 for a right one.

    greedy: reward of the greedy reply; None if that could not be graded. samples: rewards of the
    sampled replies that could be. num_failed: replies of both kinds that could not; failure: why
    the first of them.
    """

    greedy: float | None
    samples: tuple[float, ...] = ()
    num_failed: int = 0
    failure: str = ""


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Chance that at least one of k replies is right, without bias from n >= k samples of which c
    are: 1 - C(n - c, k) / C(n, k) (Chen et al., arXiv 2107.03374, equation 1).

    >>> [round(pass_at_k(8, 3, k), 5) for k in (1, 4, 8)]
    [0.375, 0.92857, 1.0]
    """
    assert 1 <= k <= num_samples and 0 <= num_right <= num_samples
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def summarise(
    outcomes: Sequence[Outcome], *, num_samples: int = 0, ks: Sequence[int] = ()
) -> dict[str, float]:
    """The figures of a set from those of its problems.

    num_samples: replies sampled to each problem. ks: of pass@k.

    Returns `accuracy`, the mean reward of greedy replies; `avg@n`, the mean reward of a sampled
    one; `pass@k`, for which a reply is right from reward 1; `num_failed`. Each mean is one over
    problems, with the standard error of such a mean as `.../stderr`. Replies that could not be
    graded are left out: a problem with fewer than k graded samples has no part in pass@k, and a
    figure without problems is not there, nor the error of a single problem.
    """
    figures = _mean("accuracy", [o.greedy for o in outcomes if o.greedy is not None])
    if num_samples:
        averages = [sum(o.samples) / len(o.samples) for o in outcomes if o.samples]
        figures |= _mean(f"avg@{num_samples}", averages)
    for k in ks:
        figures |= _mean(
            f"pass@{k}",
            [
                pass_at_k(len(o.samples), sum(reward >= 1.0 for reward in o.samples), k)
                for o in outcomes
                if len(o.samples) >= k
            ],
        )
    return {**figures, "num_failed": float(sum(o.num_failed for o in outcomes))}


def _mean(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean over problems, and its standard error, from the unbiased variance."""
    if not values:
        return {}
    mean = sum(values) / len(values)
    if len(values) == 1:
        return {name: mean}
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return {name: mean, f"{name}/stderr": math.sqrt(variance / len(values))}
