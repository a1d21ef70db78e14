"""A model that several processes train together: each takes its share of every update.

A sharded forward or backward pass is collective, so all processes make equally many, whatever
their shares are: who runs out of micro-batches computes empty ones. The weights of a loss are
those of the whole update (`types.Batch`), so gradients are summed, and the result does not depend
on the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from engine.protocol import FloatArray
from recipes.trainers.base import Logprobs, Loss
from recipes.trainers.loss_scale import LossScale
from recipes.trainers.metrics import TokenMetrics
from recipes.trainers.microbatch import by_sequence, loss_inputs, microbatches, score
from recipes.trainers.optimizer_options import OptimizerOptions
from recipes.trainers.reference import Reference
from recipes.types import Batch, Trajectory
from recipes.world import World
from trainer_bridge.adapters.base import WeightSource


class Backend(Protocol):
    """A model that a library has sharded, with its optimizer; the calls are collective."""

    model: Any
    """Called like a transformers causal LM, as a whole; has its `device`."""
    reference: Reference | None
    """The same with the frozen initial weights, if they were asked for."""
    weights: WeightSource

    @property
    def loss_scale(self) -> LossScale | None:
        """See `Learner`; the same in all processes."""
        ...

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """Add the gradient of `loss`, averaged over processes. is_last: before the step.
        In float16 the back end scales the loss itself."""
        ...

    def step(self, lr: float) -> float:
        """One clipped update; returns the norm of the gradient before clipping. All processes
        skip it, and return 0, where the gradient of one has overflowed in float16."""
        ...

    def save(self, folder: Path) -> None:
        """Write model and optimizer into an existing folder that all processes see."""
        ...

    def load(self, folder: Path) -> None:
        """Inverse of `save`."""
        ...

    def write_config(self, folder: Path, dtype: torch.dtype) -> None:
        """Write the configuration of the model, Hugging Face format."""
        ...


class ShardedTrainer:
    """A `Learner` over a `Backend`. temperature: that of the rollouts."""

    def __init__(
        self, backend: Backend, options: OptimizerOptions, world: World, *, temperature: float
    ) -> None:
        self._backend = backend
        self._options = options
        self._world = world
        self._temperature = temperature

    @property
    def weights(self) -> WeightSource:
        """See `Learner`."""
        return self._backend.weights

    def accumulate(self, batch: Batch, loss: Loss, metrics: TokenMetrics) -> bool:
        """See `Learner`. Sequences without advantage are only measured, unless there is a KL
        term; both kinds are divided among the processes, so that all have equal work."""
        learns = batch.learns
        metrics.num_updates += 1
        for with_grad in (False, True):
            rows = np.flatnonzero(learns == with_grad).tolist()
            part = batch.select(self._share(rows, batch.trajectories))
            with torch.set_grad_enabled(with_grad):
                self._run_microbatches(part, loss, metrics)
        return bool(learns.any())

    def step(self, lr: float) -> float:
        """See `Learner`."""
        return self._backend.step(lr)

    @property
    def loss_scale(self) -> LossScale | None:
        """See `Learner`."""
        return self._backend.loss_scale

    def logprobs(self, trajectories: tuple[Trajectory, ...]) -> Logprobs:
        """See `Learner`."""
        return self._logprobs(self._backend.model, trajectories)

    def reference_logprobs(self, trajectories: tuple[Trajectory, ...]) -> Logprobs:
        """See `Learner`."""
        assert self._backend.reference is not None
        with self._backend.reference as model:
            return self._logprobs(model, trajectories)

    def save(self, folder: Path) -> None:
        """See `Learner`."""
        self._backend.save(folder)

    def load(self, folder: Path) -> None:
        """See `Learner`."""
        self._backend.load(folder)

    def write_model(self, folder: Path, dtype: torch.dtype) -> None:
        """See `Learner`. The main process collects the weights in host memory."""
        import safetensors.torch

        state = {}
        for name, tensor in self.weights.tensors():
            if self._world.is_main:
                state[name] = tensor.to("cpu", dtype, copy=True).contiguous()
        if self._world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / "model.safetensors"
            safetensors.torch.save_file(state, file, metadata={"format": "pt"})
            self._backend.write_config(folder, dtype)

    def _share(self, rows: Sequence[int], trajectories: Sequence[Trajectory]) -> list[int]:
        """The rows that this process computes."""
        lengths = [len(trajectories[row].response_ids) for row in rows]
        share = even_by_length(lengths, self._world.size)[self._world.rank]
        return [rows[index] for index in share]

    def _run_microbatches(self, batch: Batch, loss: Loss, metrics: TokenMetrics) -> None:
        parts = self._microbatches(batch.trajectories)
        for index, indices in enumerate(parts):
            is_last = index == len(parts) - 1
            if indices:
                self._run(batch.select(indices), loss, metrics, is_last)
            else:
                self._run_empty(is_last)

    def _run(self, part: Batch, loss: Loss, metrics: TokenMetrics, is_last: bool) -> None:
        scores, num_nodes = score(self._backend.model, part.trajectories, self._temperature)
        inputs = loss_inputs(part, scores.logprobs, scores.logprobs.device)
        output = loss(inputs)
        if torch.is_grad_enabled():
            # Back ends average over processes; what is wanted is the sum.
            self._backend.backward(output.loss * self._world.size, is_last=is_last)
        metrics.add(inputs, output, scores.entropy, num_nodes)

    def _run_empty(self, is_last: bool) -> None:
        """A forward and, with gradients, a backward pass that add nothing."""
        logprobs_K = self._score_empty(self._backend.model)
        if torch.is_grad_enabled():
            self._backend.backward(0.0 * logprobs_K.sum(), is_last=is_last)

    def _score_empty(self, model: Any) -> torch.Tensor:
        token = np.zeros(1, dtype=np.int32)
        filler = Trajectory(
            prompt_ids=token,
            response_ids=token,
            rollout_logprobs=np.zeros(1, dtype=np.float32),
            spans=(),
            text="",
            truncated=False,
            reward=0.0,
            correct=0.0,
        )
        return score(model, [filler], self._temperature)[0].logprobs

    def _logprobs(self, model: Any, trajectories: Sequence[Trajectory]) -> Logprobs:
        rows = self._share(range(len(trajectories)), trajectories)
        mine = [trajectories[row] for row in rows]
        arrays: list[tuple[int, FloatArray]] = []
        with torch.no_grad():
            for indices in self._microbatches(mine):
                if not indices:
                    self._score_empty(model)
                    continue
                part = [mine[index] for index in indices]
                scores, _ = score(model, part, self._temperature)
                places = [rows[index] for index in indices]
                arrays += zip(places, by_sequence(scores.logprobs, part), strict=True)
        everywhere = dict(self._world.gather(arrays))
        return tuple(everywhere[row] for row in range(len(trajectories)))

    def _microbatches(self, trajectories: Sequence[Trajectory]) -> list[list[int]]:
        """Micro-batches of this process's share, with empty ones up to the most of any."""
        most_tokens = self._options.max_tokens_per_microbatch
        parts = microbatches(trajectories, most_tokens, self._backend.model.device)
        most = max(self._world.gather([len(parts)]))
        return [[] for _ in range(most - len(parts))] + parts


def even_by_length(lengths: Sequence[int], num: int) -> list[range]:
    """Cut a list into `num` runs of about equal total length, neighbours kept together."""
    ends = np.cumsum(lengths) if lengths else np.zeros(0)
    total = float(ends[-1]) if lengths else 0.0
    middles = ends - np.asarray(lengths) / 2
    cuts = [int(np.searchsorted(middles, total * part / num)) for part in range(1, num)]
    edges = [0, *cuts, len(lengths)]
    return [range(edges[part], edges[part + 1]) for part in range(num)]


def write_hf_config(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """config.json and generation_config.json of a transformers model, sharded or not."""
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
