"""Dynamic loss scaling of a float16 trainer (Micikevicius et al., arXiv 1710.03740).

float16 has nothing below 6e-8, and most gradients of a loss that is a mean over thousands of tokens
are smaller. So the loss is multiplied by a scale before the backward pass, and the gradients are
divided by it once they are float32. Where one overflows, the step is skipped and the scale halved;
after a while without that it is doubled, so that it stays near the largest that can be used. Scales
are powers of two: they change no bits of a gradient that fits.

Used by the plain and the FSDP2 trainer, which keep a `LossScale`; DeepSpeed has its own, with the
same constants, of which `LossScale` is then a reading.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engine.errors import NonFiniteGradient

FIRST_POWER = 13
"""The scale begins at two to this power: of 16, three steps were lost until it fitted SmolLM2."""
GROWTH_INTERVAL = 200
"""Steps in a row without an overflow after which the scale is doubled."""
LEAST = 1.0
"""A gradient that overflows at this scale is no matter of scaling."""


@dataclass(kw_only=True)
class LossScale:
    """What the loss of the next step is multiplied by, and what became of the steps before.

    value: the scale, a power of two. since: steps taken since it changed last. skipped: steps
    skipped since training began.
    """

    value: float = 2.0**FIRST_POWER
    since: int = 0
    skipped: int = 0

    def accept(self, norm: float) -> bool:
        """Whether to take a step whose gradient has this norm, the same in all processes; changes
        the scale for the next. Raises NonFiniteGradient when no smaller scale would help."""
        if not math.isfinite(norm):
            require_smaller(self.value)
            self.value, self.since, self.skipped = self.value / 2, 0, self.skipped + 1
            return False
        self.since += 1
        if self.since == GROWTH_INTERVAL:
            self.value, self.since = self.value * 2, 0
        return True

    def state(self) -> torch.Tensor:
        """For a checkpoint: float64 [3]."""
        return torch.tensor([self.value, self.since, self.skipped], dtype=torch.float64)

    def load(self, state: torch.Tensor) -> None:
        """Inverse of `state`."""
        value, since, skipped = state.tolist()
        self.value, self.since, self.skipped = value, int(since), int(skipped)


def loss_scale_of(dtype: torch.dtype) -> LossScale | None:
    """The scale of a trainer that computes in `dtype`; None where no dtype needs one."""
    return LossScale() if dtype == torch.float16 else None


def require_smaller(scale: float) -> None:
    """Raise NonFiniteGradient if a gradient that overflowed at `scale` cannot be had smaller."""
    if scale <= LEAST:
        raise NonFiniteGradient(
            f"the gradient is NaN or infinite at a loss scale of {LEAST:g}: activations, not "
            "gradients, overflow in float16, or the weights have diverged",
            field="dtype",
        )


def scale_figures(scale: LossScale | None) -> dict[str, float]:
    """As a step's record has them: the scale of the next step, and all steps skipped so far."""
    if scale is None:
        return {}
    return {"train/loss_scale": scale.value, "train/skipped_steps": float(scale.skipped)}
