"""From trajectories to what a forward pass and a loss take in.

Legend: K response tokens of a micro-batch, N its sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from engine.protocol import FloatArray
from recipes.algorithms.losses import LossInputs
from recipes.algorithms.values import ValueInputs
from recipes.trainers.forward import Head, TokenScores, score_tree, value_tree
from recipes.trainers.prefix_tree import PrefixTree, PromptResponse, build_tree, pack
from recipes.trainers.routing import Routing
from recipes.types import Batch, Trajectory

# Most nodes of a tree by default. A CPU's attention under a mask keeps the scores of every pair of
# nodes, in each layer, for the backward pass: time and memory grow with the square.
MAX_TOKENS = {"cpu": 1536}
MAX_TOKENS_ELSEWHERE = 4096


def microbatches(
    trajectories: Sequence[Trajectory],
    max_tokens: int | None,
    device: torch.device,
    routing: Routing | None = None,
) -> list[list[int]]:
    """Indices of the trajectories of each micro-batch; see `prefix_tree.pack`.

    max_tokens: most distinct prefix tokens at once; None takes what suits the device. routing: of
    the model, whose routes part what is shared.
    """
    if max_tokens is None:
        max_tokens = MAX_TOKENS.get(device.type, MAX_TOKENS_ELSEWHERE)
    return pack([_sequence(t, routing) for t in trajectories], max_tokens)


def score(
    model: Any,
    trajectories: Sequence[Trajectory],
    temperature: float,
    head: Head | None = None,
    routing: Routing | None = None,
) -> tuple[TokenScores, int]:
    """Scores of all response tokens, end to end, and how many tokens were computed for them.

    routing: of the model's routers, if they are replayed or looked at."""
    tree = _tree(trajectories, routing)
    return score_tree(model, tree, temperature, head), len(tree.token_ids)


def score_values(
    model: Any,
    trajectories: Sequence[Trajectory],
    head: Head,
    *,
    trunk: bool,
    routing: Routing | None = None,
) -> torch.Tensor:
    """Values of all response tokens, end to end, float32 [K]; see `forward.value_tree`."""
    tree = _tree(trajectories, routing)
    return value_tree(model, tree, head, trunk=trunk)


def by_sequence(values_K: torch.Tensor, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
    """Values of response tokens laid end to end, cut into one array a sequence."""
    ends = np.cumsum([len(t.response_ids) for t in trajectories])[:-1]
    return np.split(values_K.detach().cpu().numpy(), ends)


def loss_inputs(batch: Batch, logprobs_K: torch.Tensor, device: torch.device) -> LossInputs:
    """What the losses take in, on `device`."""
    lengths_N = np.array([len(t.response_ids) for t in batch.trajectories])

    def tokens(values: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    def flat(arrays: tuple[FloatArray, ...] | None) -> torch.Tensor | None:
        return None if arrays is None else tokens(np.concatenate(arrays))

    old_K = flat(batch.old_logprobs)
    old_K = logprobs_K.detach() if old_K is None else old_K
    rollout_K = tokens(np.concatenate([t.rollout_logprobs for t in batch.trajectories]))
    fresh_K = torch.ones_like(old_K, dtype=torch.bool)
    if batch.stale is not None:
        fresh_K = tokens(~np.repeat(batch.stale, lengths_N))
        old_K = old_K if batch.decoupled else torch.where(fresh_K, old_K, rollout_K)
    return LossInputs(
        logprobs=logprobs_K,
        old=old_K,
        rollout=rollout_K,
        fresh=fresh_K,
        reference=flat(batch.reference_logprobs),
        advantages=tokens(np.concatenate(batch.advantages)),
        weights=tokens(_token_weights(batch)),
        sequence=tokens(np.repeat(np.arange(len(lengths_N)), lengths_N)),
        num_sequences=len(lengths_N),
    )


def value_inputs(batch: Batch, values_K: torch.Tensor) -> ValueInputs:
    """What the value loss takes in, where the values are. The batch has `values` and `returns`."""
    assert batch.values is not None and batch.returns is not None

    def tokens(values: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(values_K.device)

    return ValueInputs(
        values=values_K,
        old=tokens(np.concatenate(batch.values)),
        returns=tokens(np.concatenate(batch.returns)),
        weights=tokens(_token_weights(batch)),
    )


def _token_weights(batch: Batch) -> FloatArray:
    """Weight of each response token in a loss, float32 [K]."""
    weights_K = np.repeat(batch.weights, [len(t.response_ids) for t in batch.trajectories])
    return weights_K if batch.kept is None else weights_K * np.concatenate(batch.kept)


def _tree(trajectories: Sequence[Trajectory], routing: Routing | None) -> PrefixTree:
    """The trajectories packed; the pass over them begins."""
    tree = build_tree([_sequence(t, routing) for t in trajectories])
    if routing is not None:
        routing.begin(tree)
    return tree


def _sequence(trajectory: Trajectory, routing: Routing | None) -> PromptResponse:
    if routing is not None:
        return routing.sequence(trajectory)
    return PromptResponse(prompt_ids=trajectory.prompt_ids, response_ids=trajectory.response_ids)
