"""Sums of per-token figures over micro-batches and updates of one step.

Legend: K response tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from recipes.algorithms.kl import k3
from recipes.algorithms.losses import LossInputs, LossOutput
from recipes.algorithms.values import ValueOutput
from recipes.trainers.balance import load_entropy, max_violation
from recipes.trainers.routing import RoutingCounts


@dataclass(slots=True)
class TokenMetrics:
    """Accumulates what the losses report; `result()` gives the names that are logged."""

    num_updates: int = 0
    num_tokens: int = 0
    num_fresh: int = 0
    computed_tokens: int = 0
    loss: float = 0.0
    entropy: float = 0.0
    clip_low: float = 0.0
    clip_high: float = 0.0
    difference: float = 0.0
    difference_max: float = 0.0
    mismatch_kl: float = 0.0
    mismatch_k3: float = 0.0
    importance: float = 0.0
    importance_min: float = float("inf")
    importance_max: float = 0.0
    reference_kl: float | None = None
    num_value_updates: int = 0
    num_value_tokens: int = 0
    value_loss: float = 0.0
    value_clipped: float = 0.0
    routing: RoutingCounts | None = None

    def add(
        self, inputs: LossInputs, output: LossOutput, entropy_K: torch.Tensor, num_nodes: int
    ) -> None:
        """Take in one micro-batch; `num_nodes` tokens were computed for it."""
        self.num_tokens += len(inputs.rollout)
        self._compare(inputs)
        self.computed_tokens += num_nodes
        self.loss += float(output.loss.detach())
        self.entropy += float(entropy_K.sum())
        self.clip_low += float(output.clipped_low.sum())
        self.clip_high += float(output.clipped_high.sum())
        self.importance += float(output.importance.sum())
        self.importance_min = min(self.importance_min, float(output.importance.min()))
        self.importance_max = max(self.importance_max, float(output.importance.max()))
        if output.kl is not None:
            self.reference_kl = (self.reference_kl or 0.0) + float(output.kl.sum())

    def _compare(self, inputs: LossInputs) -> None:
        """Engine and trainer on tokens that the weights now learning sampled."""
        old_K, rollout_K = inputs.old, inputs.rollout
        if inputs.fresh is not None:
            old_K, rollout_K = old_K[inputs.fresh], rollout_K[inputs.fresh]
        if not len(old_K):
            return
        difference_K = (old_K - rollout_K).abs()
        self.num_fresh += len(old_K)
        self.difference += float(difference_K.sum())
        self.difference_max = max(self.difference_max, float(difference_K.max()))
        self.mismatch_kl += float((rollout_K - old_K).sum())
        self.mismatch_k3 += float(k3(rollout_K, old_K).sum())

    def add_values(self, output: ValueOutput) -> None:
        """Take in the value loss of one micro-batch."""
        self.num_value_tokens += len(output.clipped)
        self.value_loss += float(output.loss.detach())
        self.value_clipped += float(output.clipped.sum())

    def add_routing(self, counts: RoutingCounts | None) -> None:
        """Take in what the routers did in one micro-batch; None of a dense model."""
        if counts is not None:
            self.routing = counts if self.routing is None else self.routing + counts

    def result(self) -> dict[str, float]:
        """Means over tokens under the names TRL and verl log; empty before the first `add`."""
        values = self._value_figures() | self.routing_figures()
        if not self.num_tokens:
            return values
        num, fresh = self.num_tokens, max(self.num_fresh, 1)
        named = {
            "loss": self.loss / max(self.num_updates, 1),
            "entropy": self.entropy / num,
            "clip_ratio/low_mean": self.clip_low / num,
            "clip_ratio/high_mean": self.clip_high / num,
            "clip_ratio/region_mean": (self.clip_low + self.clip_high) / num,
            "sampling/sampling_logp_difference/mean": self.difference / fresh,
            "sampling/sampling_logp_difference/max": self.difference_max,
            "sampling/importance_sampling_ratio/min": self.importance_min,
            "sampling/importance_sampling_ratio/mean": self.importance / num,
            "sampling/importance_sampling_ratio/max": self.importance_max,
            "rollout_corr/kl": self.mismatch_kl / fresh,
            "rollout_corr/k3_kl": self.mismatch_k3 / fresh,
            "perf/trained_response_tokens": float(num),
            "perf/stale_response_tokens": float(num - self.num_fresh),
            "perf/trainer_computed_tokens": float(self.computed_tokens),
        }
        if self.reference_kl is not None:
            named["kl"] = self.reference_kl / num
        return {**named, **values}

    def _value_figures(self) -> dict[str, float]:
        if not self.num_value_tokens:
            return {}
        return {
            "critic/vf_loss": self.value_loss / max(self.num_value_updates, 1),
            "critic/vf_clipfrac": self.value_clipped / self.num_value_tokens,
        }

    def routing_figures(self) -> dict[str, float]:
        """How evenly experts are used, and what replayed routes changed; nothing of a dense
        model."""
        counts = self.routing
        if counts is None:
            return {}
        figures = {
            "router/load_entropy": load_entropy(counts.load),
            "router/max_violation": max_violation(counts.load),
        }
        if counts.aux_loss:
            figures["router/aux_loss"] = counts.aux_loss / max(self.num_updates, 1)
        if routed := counts.replayed + counts.absent:
            figures["router/replay_flips"] = counts.flips / max(counts.replayed, 1)
            figures["router/replay_absent"] = counts.absent / routed
        return figures


def merge(parts: Sequence[TokenMetrics]) -> TokenMetrics:
    """The figures of one step of which each process saw a part."""
    smallest, largest = {"importance_min"}, {"difference_max", "importance_max"}
    # Every process counts each update.
    updates = {"num_updates", "num_value_updates"}
    merged = TokenMetrics()
    for field in dataclasses.fields(TokenMetrics):
        values = [v for v in (getattr(part, field.name) for part in parts) if v is not None]
        if not values:
            continue
        join = min if field.name in smallest else max if field.name in largest | updates else _sum
        setattr(merged, field.name, join(values))
    return merged


def _sum(values: Sequence[Any]) -> Any:
    return functools.reduce(operator.add, values)
