"""How the weight of the KL to the reference changes over a run."""

from __future__ import annotations

from typing import Literal

KLController = Literal["fixed", "adaptive"]

MOST_ERROR = 0.2


def adapted(coef: float, kl: float, *, target: float, horizon: float, num: int) -> float:
    """The coefficient after an update: coef * (1 + clip(kl / target - 1, -.2, .2) * num / horizon).

    D. Ziegler et al., arXiv 1909.08593: the KL is held near `target`.
    kl: nats of a whole reply, the mean over the replies of the update. num: replies of the update;
    the coefficient changes by at most a fifth over `horizon` of them.
    """
    error = min(max(kl / target - 1, -MOST_ERROR), MOST_ERROR)
    return coef * (1 + error * num / horizon)
