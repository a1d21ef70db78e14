"""Options of the optimizer and of the trainer's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recipes.trainers.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """AdamW and how a batch is fed to it."""

    lr: float = 1e-5
    """Peak learning rate."""
    schedule: Schedule = "constant"
    """What follows the warm-up: stay, or fall to zero at the last step."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.999
    """AdamW's decay of the squared gradient."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it."""
    dither: Literal["on", "off"] = "on"
    """Start float32 masters of a 16-bit checkpoint inside the rounding cells of --dtype, so that
    small steps show at once in the 16-bit weights; what is served at step 0 does not change."""
    max_tokens_per_microbatch: int | None = None
    """Distinct prefix tokens computed at once; the default is 4096 on a GPU, where more is faster
    and takes more memory, and 1536 on a CPU, where attention keeps a score for every pair."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: far less memory, a third more time."""
