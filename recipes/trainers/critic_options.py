"""Options of PPO's critic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CriticNetwork = Literal["shared", "own"]


@dataclass(frozen=True, kw_only=True)
class CriticOptions:
    """The critic: what estimates the return of each token, and how it learns."""

    critic: CriticNetwork = "shared"
    """shared: a value head on the policy's own network; own: a network of its own, which costs the
    memory and the time of a second model."""
    critic_model: str | None = None
    """Hugging Face folder or GGUF file that the critic of its own starts from, with the policy's
    vocabulary: a language model, or a reward model of one label, whose head the values start from;
    None takes the policy's."""
    critic_lr: float | None = None
    """Peak learning rate of the value head, and of the critic's own network; None takes 5 times
    --lr. It follows the schedule of --lr."""
    critic_warmup_steps: int = 5
    """First steps that train the critic alone: with a shared network, its value head."""
    value_coef: float = 0.1
    """Weight of the value loss beside the policy's, where they share a network."""
    value_clip: float = 0.2
    """A value that moved further than this from where it was at the beginning of the step has no
    gradient to move on."""
    normalise_values: bool = False
    """Have the critic learn returns as deviations from the mean of all returns of the run so far,
    for rewards far from 0 to 1."""
    gae_lambda: float = 0.95
    """Share of the advantage that is taken from the rewards themselves: 1 all of it, 0 none beyond
    the next token's value (generalised advantage estimation)."""
