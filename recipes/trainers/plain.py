"""The plain trainer: a transformers causal LM with float32 weights and AdamW, one process.

Legend: K response tokens of a micro-batch, N its sequences.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from engine.protocol import FloatArray
from recipes.algorithms.losses import LossInputs, LossOutput
from recipes.trainers.forward import TokenScores, score_tree
from recipes.trainers.metrics import TokenMetrics
from recipes.trainers.options import OptimizerOptions
from recipes.trainers.prefix_tree import PromptResponse, build_tree, pack
from recipes.types import Batch, Trajectory

Loss = Callable[[LossInputs], LossOutput]


class Trainer:
    """Owns the model that learns, its optimizer, and the frozen reference where KL is asked.

    model: moved to `device` in float32. autocast_dtype: bfloat16 runs the forward pass under
    autocast; float32 runs it as it is. temperature: that of the rollouts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        options: OptimizerOptions,
        *,
        device: torch.device,
        autocast_dtype: torch.dtype,
        temperature: float,
        keep_reference: bool = False,
    ) -> None:
        self.model: PreTrainedModel = model.to(device=device, dtype=torch.float32).eval()
        self.model.set_attn_implementation("sdpa")
        self.options = options
        self.device = device
        self.autocast_dtype = autocast_dtype
        self.temperature = temperature
        self.reference: PreTrainedModel | None = None
        if keep_reference:
            self.reference = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
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
        learns = (batch.advantages != 0) | (batch.reference_logprobs is not None)
        metrics.num_updates += 1
        for with_grad in (True, False):
            part = batch.select(np.flatnonzero(learns == with_grad).tolist())
            with torch.set_grad_enabled(with_grad):
                self._run_microbatches(part, loss, metrics)
        return bool(learns.any())

    def _run_microbatches(self, batch: Batch, loss: Loss, metrics: TokenMetrics) -> None:
        for indices in self._microbatches(batch.trajectories):
            part = batch.select(indices)
            scores, num_nodes = self._score(self.model, part.trajectories)
            inputs = _loss_inputs(part, scores.logprobs, self.device)
            output = loss(inputs)
            if output.loss.requires_grad:
                output.loss.backward()
            metrics.add(inputs, output, scores.entropy, num_nodes)

    def step(self, lr: float) -> float:
        """One clipped AdamW update with the accumulated gradient; returns its norm before."""
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.options.max_grad_norm, foreach=True
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def logprobs(self, trajectories: tuple[Trajectory, ...]) -> tuple[FloatArray, ...]:
        """Per sequence, float32 [response_len] under the current weights, without gradient."""
        return self._logprobs(self.model, trajectories)

    def reference_logprobs(self, trajectories: tuple[Trajectory, ...]) -> tuple[FloatArray, ...]:
        """As `logprobs`, under the initial weights."""
        assert self.reference is not None
        return self._logprobs(self.reference, trajectories)

    def state_dict(self) -> dict[str, Any]:
        """Model and optimizer, for a checkpoint."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`. The reference keeps the weights it was made from."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _logprobs(
        self, model: PreTrainedModel, trajectories: tuple[Trajectory, ...]
    ) -> tuple[FloatArray, ...]:
        arrays: dict[int, FloatArray] = {}
        for indices in self._microbatches(trajectories):
            part = tuple(trajectories[i] for i in indices)
            with torch.no_grad():
                scores, _ = self._score(model, part)
            ends = np.cumsum([len(t.response_ids) for t in part])[:-1]
            arrays.update(zip(indices, np.split(scores.logprobs.cpu().numpy(), ends), strict=True))
        return tuple(arrays[i] for i in range(len(trajectories)))

    def _score(
        self, model: PreTrainedModel, trajectories: tuple[Trajectory, ...]
    ) -> tuple[TokenScores, int]:
        tree = build_tree([_sequence(t) for t in trajectories])
        with self._autocast():
            return score_tree(model, tree, self.temperature), len(tree.token_ids)

    def _microbatches(self, trajectories: tuple[Trajectory, ...]) -> list[list[int]]:
        sequences = [_sequence(t) for t in trajectories]
        return pack(sequences, self.options.max_tokens_per_microbatch)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(
            self.device.type,
            dtype=torch.bfloat16,
            enabled=self.autocast_dtype == torch.bfloat16,
        )


def _sequence(trajectory: Trajectory) -> PromptResponse:
    return PromptResponse(prompt_ids=trajectory.prompt_ids, response_ids=trajectory.response_ids)


def _loss_inputs(batch: Batch, logprobs_K: torch.Tensor, device: torch.device) -> LossInputs:
    lengths_N = np.array([len(t.response_ids) for t in batch.trajectories])

    def tokens(values: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    def flat(arrays: tuple[FloatArray, ...] | None) -> torch.Tensor | None:
        return None if arrays is None else tokens(np.concatenate(arrays))

    old_K = flat(batch.old_logprobs)
    return LossInputs(
        logprobs=logprobs_K,
        old=logprobs_K.detach() if old_K is None else old_K,
        rollout=tokens(np.concatenate([t.rollout_logprobs for t in batch.trajectories])),
        reference=flat(batch.reference_logprobs),
        advantages=tokens(np.repeat(batch.advantages, lengths_N)),
        weights=tokens(np.repeat(batch.weights, lengths_N)),
        sequence=tokens(np.repeat(np.arange(len(lengths_N)), lengths_N)),
        num_sequences=len(lengths_N),
    )
