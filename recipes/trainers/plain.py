"""The plain trainer: a transformers causal LM with float32 masters and AdamW, one process.

Legend: K response tokens of a micro-batch, N its sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from engine.protocol import FloatArray
from recipes.trainers.base import Logprobs, Loss, Values
from recipes.trainers.loss_scale import LossScale, loss_scale_of
from recipes.trainers.masters import Masters
from recipes.trainers.memory import recompute_layers
from recipes.trainers.metrics import TokenMetrics
from recipes.trainers.microbatch import (
    by_sequence,
    loss_inputs,
    microbatches,
    score,
    score_values,
)
from recipes.trainers.optimizer_options import OptimizerOptions
from recipes.trainers.reference import Reference, reference_of
from recipes.trainers.value_head import ValueHead
from recipes.types import Batch, Trajectory
from trainer_bridge.adapters.buffers import keep_buffers, restore_buffers

TENSORS = "trainer.pt"


class Trainer:
    """A `Learner` of one process: the model, its optimizer, and the reference where KL is asked.

    model: float32; moved to `device`, where its parameters become `dtype`, which the engine
    serves; the optimizer keeps float32 masters of them, and in float16 the loss is scaled.
    temperature: that of the rollouts. reference: the same model with its initial weights, where
    there is a KL term, in host memory between its passes if `reference_on_host`. head: a critic's,
    on this model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        options: OptimizerOptions,
        *,
        device: torch.device,
        dtype: torch.dtype,
        temperature: float,
        reference: PreTrainedModel | None = None,
        reference_on_host: bool = False,
        head: ValueHead | None = None,
    ) -> None:
        self.model: PreTrainedModel = model.to(device=device, dtype=torch.float32).eval()
        self.model.set_attn_implementation("sdpa")
        if options.gradient_checkpointing:
            recompute_layers(self.model)
        self.options = options
        self.device = device
        self.temperature = temperature
        self.head = head
        self.loss_scale: LossScale | None = loss_scale_of(dtype)
        self.masters = Masters(self.model, dtype, self.loss_scale)
        self.reference: Reference | None = None
        if reference is not None:
            frozen = _frozen(reference, dtype)
            self.reference = reference_of(frozen, device, on_host=reference_on_host)
        self.optimizer = torch.optim.AdamW(
            self.masters.parameters,
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
            fused=True,
        )

    def accumulate(self, batch: Batch, loss: Loss, metrics: TokenMetrics) -> bool:
        """Add the gradient of the batch's loss, micro-batch by micro-batch.

        Sequences without advantage have no gradient, unless there is a KL term: they are only
        measured. Returns whether there is any gradient; if not, do not `step`.
        """
        learns = batch.learns
        metrics.num_updates += 1
        metrics.num_value_updates += self.head is not None
        for with_grad in (True, False):
            part = batch.select(np.flatnonzero(learns == with_grad).tolist())
            with torch.set_grad_enabled(with_grad):
                self._run_microbatches(part, loss, metrics)
        return bool(learns.any())

    def _run_microbatches(self, batch: Batch, loss: Loss, metrics: TokenMetrics) -> None:
        for indices in self._microbatches(batch.trajectories):
            part = batch.select(indices)
            head = self.head if part.returns is not None else None
            scores, num_nodes = score(self.model, part.trajectories, self.temperature, head)
            inputs = loss_inputs(part, scores.logprobs, self.device)
            output = loss(inputs)
            total = output.loss
            if head is not None and scores.values is not None:
                total = total + head.loss(part, scores.values, metrics)
            if total.requires_grad:
                self._scaled(total).backward()
            metrics.add(inputs, output, scores.entropy, num_nodes)

    def accumulate_values(self, batch: Batch, metrics: TokenMetrics, *, trunk: bool) -> None:
        """See `Learner`."""
        assert self.head is not None
        metrics.num_value_updates += 1
        for indices in self._microbatches(batch.trajectories):
            part = batch.select(indices)
            values_K = score_values(self.model, part.trajectories, self.head, trunk=trunk)
            loss = self.head.loss(part, values_K, metrics)
            if trunk:
                self._scaled(loss).backward()

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        return loss if self.loss_scale is None else loss * self.loss_scale.value

    def step(self, lr: float) -> float:
        """One clipped AdamW update with the accumulated gradient; see `Learner`."""
        if self.head is not None:
            self.head.step(lr)
        norm = torch.nn.utils.clip_grad_norm_(
            self.masters.parameters, self.options.max_grad_norm, foreach=True
        )
        if self.loss_scale is not None and not self.loss_scale.accept(float(norm)):
            self.optimizer.zero_grad(set_to_none=True)
            return 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.masters.publish()
        return float(norm)

    def step_head(self, lr: float) -> float:
        """See `Learner`."""
        assert self.head is not None
        return self.head.step(lr)

    def logprobs(self, trajectories: tuple[Trajectory, ...]) -> Logprobs:
        """Per sequence, float32 [response_len] under the current weights, without gradient."""
        return self._logprobs(self.model, trajectories)

    def reference_logprobs(self, trajectories: tuple[Trajectory, ...]) -> Logprobs:
        """As `logprobs`, under the initial weights."""
        assert self.reference is not None
        with self.reference as model:
            return self._logprobs(model, trajectories)

    @property
    def weights(self) -> PreTrainedModel:
        """The model itself: an engine of this process reads it in place."""
        return self.model

    def save(self, folder: Path) -> None:
        """Write model and optimizer into a checkpoint's folder."""
        state: dict[str, Any] = {
            "model": self.masters.state(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.loss_scale is not None:
            state["loss_scale"] = self.loss_scale.state()
        torch.save(state, folder / TENSORS)
        if self.head is not None:
            self.head.save(folder)

    def load(self, folder: Path) -> None:
        """Inverse of `save`. The reference keeps the weights it was made from."""
        state = torch.load(folder / TENSORS, map_location="cpu", weights_only=True)
        self.masters.load(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.loss_scale is not None:
            self.loss_scale.load(state["loss_scale"])
        if self.head is not None:
            self.head.load(folder)

    def write_model(self, folder: Path, dtype: torch.dtype) -> None:
        """Write the model in Hugging Face format; it is cast itself."""
        kept = keep_buffers(self.model)
        self.model.to(dtype=dtype)
        restore_buffers(self.model, kept)
        self.model.save_pretrained(folder)

    def values(self, trajectories: tuple[Trajectory, ...]) -> Values:
        """See `Learner`."""
        head = self.head
        assert head is not None
        return self._per_sequence(
            trajectories, lambda part: score_values(self.model, part, head, trunk=False)
        )

    def _logprobs(self, model: Any, trajectories: tuple[Trajectory, ...]) -> Logprobs:
        return self._per_sequence(
            trajectories, lambda part: score(model, part, self.temperature)[0].logprobs
        )

    def _per_sequence(
        self,
        trajectories: tuple[Trajectory, ...],
        compute: Callable[[Sequence[Trajectory]], torch.Tensor],
    ) -> tuple[FloatArray, ...]:
        """What `compute` gives of each micro-batch, float32 [K], without gradient."""
        arrays: dict[int, FloatArray] = {}
        for indices in self._microbatches(trajectories):
            part = [trajectories[i] for i in indices]
            with torch.no_grad():
                values_K = compute(part)
            arrays.update(zip(indices, by_sequence(values_K, part), strict=True))
        return tuple(arrays[i] for i in range(len(trajectories)))

    def _microbatches(self, trajectories: Sequence[Trajectory]) -> list[list[int]]:
        return microbatches(trajectories, self.options.max_tokens_per_microbatch, self.device)


def _frozen(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The reference as the trainer computes it."""
    model = model.to(dtype=torch.float32).eval().requires_grad_(False)
    model.set_attn_implementation("sdpa")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
