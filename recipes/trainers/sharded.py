"""A model that several processes train together: each takes its share of every update.

A sharded forward or backward pass is collective, so all processes make equally many, whatever
their shares are: who runs out of micro-batches computes empty ones. The weights of a loss are
those of the whole update (`types.Batch`), so gradients are summed, and the result does not depend
on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from engine.protocol import FloatArray
from recipes.trainers.base import Logprobs, Loss, Values
from recipes.trainers.loss_scale import LossScale
from recipes.trainers.metrics import TokenMetrics
from recipes.trainers.microbatch import (
    by_sequence,
    loss_inputs,
    microbatches,
    score,
    score_values,
)
from recipes.trainers.optimizer_options import OptimizerOptions
from recipes.trainers.reference import Reference
from recipes.trainers.value_head import ValueHead
from recipes.types import Batch, Trajectory
from recipes.world import World
from trainer_bridge.adapters.base import WeightSource
from trainer_bridge.adapters.buffers import wire_dtype
from trainer_bridge.expert_names import in_file


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
    """A `Learner` over a `Backend`. temperature: that of the rollouts. head: a critic's, on this
    model, whole in every process."""

    def __init__(
        self,
        backend: Backend,
        options: OptimizerOptions,
        world: World,
        *,
        temperature: float,
        head: ValueHead | None = None,
    ) -> None:
        self._backend = backend
        self._options = options
        self._world = world
        self._temperature = temperature
        self._head = head

    @property
    def weights(self) -> WeightSource:
        """See `Learner`."""
        return self._backend.weights

    def accumulate(self, batch: Batch, loss: Loss, metrics: TokenMetrics) -> bool:
        """See `Learner`. Sequences without advantage are only measured, unless there is a KL
        term; both kinds are divided among the processes, so that all have equal work."""
        learns = batch.learns
        metrics.num_updates += 1
        metrics.num_value_updates += self._head is not None
        for with_grad in (False, True):
            rows = np.flatnonzero(learns == with_grad).tolist()
            part = batch.select(self._share(rows, batch.trajectories))
            with torch.set_grad_enabled(with_grad):
                self._run_microbatches(part, loss, metrics)
        return bool(learns.any())

    def accumulate_values(self, batch: Batch, metrics: TokenMetrics, *, trunk: bool) -> None:
        """See `Learner`."""
        metrics.num_value_updates += 1
        rows = range(len(batch.trajectories))
        part = batch.select(self._share(rows, batch.trajectories))
        parts = self._microbatches(part.trajectories)
        for index, indices in enumerate(parts):
            loss = self._value_loss(part.select(indices), metrics, trunk=trunk)
            if trunk:
                is_last = index == len(parts) - 1
                self._backend.backward(loss * self._world.size, is_last=is_last)

    def _value_loss(self, part: Batch, metrics: TokenMetrics, *, trunk: bool) -> torch.Tensor:
        """Of a micro-batch, or of an empty one, which adds nothing."""
        assert self._head is not None
        model, empty = self._backend.model, not part.trajectories
        trajectories = [_filler()] if empty else part.trajectories
        values_K = score_values(model, trajectories, self._head, trunk=trunk)
        return 0.0 * values_K.sum() if empty else self._head.loss(part, values_K, metrics)

    def step(self, lr: float) -> float:
        """See `Learner`."""
        if self._head is not None:
            self._head.step(lr)
        return self._backend.step(lr)

    @property
    def loss_scale(self) -> LossScale | None:
        """See `Learner`."""
        return self._backend.loss_scale

    def step_head(self, lr: float) -> float:
        """See `Learner`."""
        assert self._head is not None
        return self._head.step(lr)

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
        if self._head is not None and self._world.is_main:
            self._head.save(folder)

    def load(self, folder: Path) -> None:
        """See `Learner`."""
        self._backend.load(folder)
        if self._head is not None:
            self._head.load(folder)

    def write_model(self, folder: Path, dtype: torch.dtype) -> None:
        """See `Learner`. The main process collects the weights in host memory."""
        import safetensors.torch

        state: dict[str, torch.Tensor] = {}
        model = self._backend.model
        family = getattr(model, "module", model).config.model_type
        for name, tensor in self.weights.tensors():
            if self._world.is_main:
                # Buffers that travel are float32 in a file too.
                whole = tensor.to("cpu", wire_dtype(name, dtype), copy=True)
                state |= {label: part.contiguous() for label, part in in_file(name, whole, family)}
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
        head = self._head if batch.returns is not None else None
        parts = self._microbatches(batch.trajectories)
        for index, indices in enumerate(parts):
            if indices:
                total = self._run(batch.select(indices), loss, metrics, head)
            else:
                total = self._run_empty(head)
            if torch.is_grad_enabled():
                # Back ends average over processes; what is wanted is the sum.
                is_last = index == len(parts) - 1
                self._backend.backward(total * self._world.size, is_last=is_last)

    def _run(
        self, part: Batch, loss: Loss, metrics: TokenMetrics, head: ValueHead | None
    ) -> torch.Tensor:
        scores, num_nodes = score(self._backend.model, part.trajectories, self._temperature, head)
        inputs = loss_inputs(part, scores.logprobs, scores.logprobs.device)
        output = loss(inputs)
        metrics.add(inputs, output, scores.entropy, num_nodes)
        if head is None or scores.values is None:
            return output.loss
        return output.loss + head.loss(part, scores.values, metrics)

    def _run_empty(self, head: ValueHead | None) -> torch.Tensor:
        """What adds nothing. It has the same outputs with a gradient as `_run`: ZeRO-3 follows the
        order in which they are used, and waits for ever for a process with another one."""
        scores, _ = score(self._backend.model, [_filler()], self._temperature, head)
        nothing = 0.0 * scores.logprobs.sum()
        return nothing if scores.values is None else nothing + 0.0 * scores.values.sum()

    def values(self, trajectories: tuple[Trajectory, ...]) -> Values:
        """See `Learner`."""
        head, model = self._head, self._backend.model
        assert head is not None
        return self._per_sequence(
            trajectories, lambda part: score_values(model, part, head, trunk=False)
        )

    def _logprobs(self, model: Any, trajectories: Sequence[Trajectory]) -> Logprobs:
        return self._per_sequence(
            trajectories, lambda part: score(model, part, self._temperature)[0].logprobs
        )

    def _per_sequence(
        self,
        trajectories: Sequence[Trajectory],
        compute: Callable[[Sequence[Trajectory]], torch.Tensor],
    ) -> tuple[FloatArray, ...]:
        """What `compute` gives of each micro-batch, float32 [K], without gradient; gathered."""
        rows = self._share(range(len(trajectories)), trajectories)
        mine = [trajectories[row] for row in rows]
        arrays: list[tuple[int, FloatArray]] = []
        with torch.no_grad():
            for indices in self._microbatches(mine):
                if not indices:
                    compute([_filler()])
                    continue
                part = [mine[index] for index in indices]
                places = [rows[index] for index in indices]
                arrays += zip(places, by_sequence(compute(part), part), strict=True)
        everywhere = dict(self._world.gather(arrays))
        return tuple(everywhere[row] for row in range(len(trajectories)))

    def _microbatches(self, trajectories: Sequence[Trajectory]) -> list[list[int]]:
        """Micro-batches of this process's share, with empty ones up to the most of any."""
        most_tokens = self._options.max_tokens_per_microbatch
        parts = microbatches(trajectories, most_tokens, self._backend.model.device)
        most = max(self._world.gather([len(parts)]))
        return [[] for _ in range(most - len(parts))] + parts


def _filler() -> Trajectory:
    """What a process whose share is used up computes: one token."""
    token = np.zeros(1, dtype=np.int32)
    return Trajectory(
        prompt_ids=token,
        response_ids=token,
        rollout_logprobs=np.zeros(1, dtype=np.float32),
        spans=(),
        text="",
        truncated=False,
        reward=0.0,
        correct=0.0,
    )


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
