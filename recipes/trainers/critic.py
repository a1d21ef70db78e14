"""PPO's critic as the loop uses it: a value head on the policy's network, or a network of its own.

Both are a `Learner` with a value head; a critic on the shared network is the policy's learner.
"""

from __future__ import annotations

from pathlib import Path

from recipes.trainers.base import Learner, Values
from recipes.trainers.checkpoint import checkpoint_bytes
from recipes.trainers.metrics import TokenMetrics
from recipes.types import Batch, Trajectory

FOLDER = "critic"


class Critic:
    """Estimates what a reply will earn from each of its tokens on, and learns to.

    learner: has a value head. own: it is a network of its own, not the policy's. lr_ratio: the
    critic's learning rate over the policy's. warmup_steps: steps of a run that train it alone.
    normalises: its values are deviations from the mean return of the run so far, in standard
    deviations (arXiv 2103.01955, without a correction of the head when those change).
    """

    def __init__(
        self,
        learner: Learner,
        *,
        own: bool,
        lr_ratio: float,
        warmup_steps: int = 0,
        normalises: bool = False,
    ) -> None:
        self.own = own
        self.normalises = normalises
        self.warmup_steps = warmup_steps
        self._learner = learner
        self._lr_ratio = lr_ratio

    def values(self, trajectories: tuple[Trajectory, ...]) -> Values:
        """See `Learner.values`; collective."""
        return self._learner.values(trajectories)

    def fit(self, batch: Batch, metrics: TokenMetrics, lr: float) -> float:
        """One update towards the returns of the batch, which leaves the policy as it is; returns
        the norm of its gradient: 0 for a batch of nothing, which is no update. lr: the policy's.
        Collective."""
        if not batch.trajectories:
            return 0.0
        self._learner.accumulate_values(batch, metrics, trunk=self.own)
        if self.own:
            return self._learner.step(self.lr(lr))
        return self._learner.step_head(lr)

    def lr(self, lr: float) -> float:
        """The critic's learning rate where the policy's is `lr`."""
        return lr * self._lr_ratio

    def checkpoint_bytes(self) -> int:
        """About the bytes that `save` writes."""
        return checkpoint_bytes(self._learner.weights) if self.own else 0

    def save(self, folder: Path) -> None:
        """Write what the policy's learner does not write; collective."""
        if self.own:
            (folder / FOLDER).mkdir(exist_ok=True)
            self._learner.save(folder / FOLDER)

    def load(self, folder: Path) -> None:
        """Inverse of `save`."""
        if self.own:
            self._learner.load(folder / FOLDER)
