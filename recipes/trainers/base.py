"""What the loop needs of a trainer, however many processes it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from engine.protocol import FloatArray
from recipes.algorithms.losses import LossInputs, LossOutput
from recipes.trainers.loss_scale import LossScale
from recipes.trainers.metrics import TokenMetrics
from recipes.types import Batch, Trajectory
from trainer_bridge.adapters.base import WeightSource

Loss = Callable[[LossInputs], LossOutput]
Logprobs = tuple[FloatArray, ...]
Values = tuple[FloatArray, ...]


class Learner(Protocol):
    """A model that learns. Every call is made by all processes of the run, with equal arguments;
    each computes its share."""

    @property
    def weights(self) -> torch.nn.Module | WeightSource:
        """What is published to engines."""
        ...

    def accumulate(self, batch: Batch, loss: Loss, metrics: TokenMetrics) -> bool:
        """Add the gradient of the batch's loss, and of the value loss where there is a value head
        and the batch has returns. Returns whether there is any; if not, do not `step`. metrics:
        takes in the figures of this process's share."""
        ...

    def accumulate_values(self, batch: Batch, metrics: TokenMetrics, *, trunk: bool) -> None:
        """Add the gradient of the value loss alone. trunk: that of the model too, not just that of
        the value head. Needs a head, and a batch with values and returns."""
        ...

    def step(self, lr: float) -> float:
        """One clipped update of the model with the accumulated gradient, and of the value head if
        there is one; returns the norm of the model's gradient before clipping.

        In float16 a gradient that overflowed is dropped: nothing of the model changes but the loss
        scale, and the norm is 0. Raises NonFiniteGradient when no smaller scale would help.
        """
        ...

    @property
    def loss_scale(self) -> LossScale | None:
        """What the loss is scaled by and how many steps were skipped; None unless in float16."""
        ...

    def step_head(self, lr: float) -> float:
        """One update of the value head alone; returns the norm of its gradient. lr: the model's."""
        ...

    def values(self, trajectories: tuple[Trajectory, ...]) -> Values:
        """Per sequence, float32 [response_len], the value of the state before each token by the
        current value head, without gradient."""
        ...

    def logprobs(self, trajectories: tuple[Trajectory, ...]) -> Logprobs:
        """Per sequence, float32 [response_len] under the current weights, without gradient."""
        ...

    def reference_logprobs(self, trajectories: tuple[Trajectory, ...]) -> Logprobs:
        """As `logprobs`, under the initial weights."""
        ...

    def save(self, folder: Path) -> None:
        """Write model and optimizer into an existing folder."""
        ...

    def load(self, folder: Path) -> None:
        """Inverse of `save`."""
        ...

    def write_model(self, folder: Path, dtype: torch.dtype) -> None:
        """Write the model in Hugging Face format, in `dtype`. Call this when training is over."""
        ...
