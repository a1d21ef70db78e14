"""The recipe's trainer without its prefix tree: sequences in padded rows, each computed whole.

What `benchmarks/grpo_step.py` tells the engine's part of a step's speed from the tree's with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from recipes.trainers.forward import TokenScores
from recipes.trainers.plain import Trainer
from recipes.types import Trajectory


class PaddedTrainer(Trainer):
    """`Trainer` over micro-batches of `rows` sequences, as `grpo_baseline.Baseline` makes them."""

    rows = 16

    def _microbatches(self, trajectories: Sequence[Trajectory]) -> list[list[int]]:
        places = range(len(trajectories))
        return [list(places[at : at + self.rows]) for at in places[:: self.rows]]

    def _score(self, model: Any, trajectories: Sequence[Trajectory]) -> tuple[TokenScores, int]:
        return score_padded(model, trajectories, self.temperature)


def score_padded(
    model: Any, trajectories: Sequence[Trajectory], temperature: float
) -> tuple[TokenScores, int]:
    """What `recipes.trainers.microbatch.score` returns: scores of all response tokens, end to end,
    and how many tokens were computed for them, padding included."""
    device = model.device
    ids_NT, mask_NT, longest = _pad(trajectories)
    response_NR, counts_NR = ids_NT[:, longest:], mask_NT[:, longest:].bool()
    # The last response token is predicted, never fed.
    fed_NT, attend_NT = ids_NT[:, :-1].to(device), mask_NT[:, :-1].to(device)
    logits_NRV = model(
        fed_NT,
        attention_mask=attend_NT,
        position_ids=(attend_NT.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=response_NR.shape[1],
    ).logits
    logits_KV = logits_NRV[counts_NR.to(device)].float() / temperature
    logsumexp_K = logits_KV.logsumexp(dim=-1)
    targets_K = response_NR[counts_NR].to(device)
    logprobs_K = logits_KV.gather(1, targets_K[:, None])[:, 0] - logsumexp_K
    with torch.no_grad():
        probs_KV = (logits_KV - logsumexp_K[:, None]).exp()
        entropy_K = logsumexp_K - (probs_KV * logits_KV).sum(dim=-1)
    return TokenScores(logprobs=logprobs_K, entropy=entropy_K), fed_NT.numel()


def _pad(trajectories: Sequence[Trajectory]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Ids and mask, int64 [N, T], prompts padded on the left and responses on the right; and where
    the responses begin."""
    longest = max(len(t.prompt_ids) for t in trajectories)
    width = longest + max(len(t.response_ids) for t in trajectories)
    ids = np.zeros((len(trajectories), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, t in enumerate(trajectories):
        start, stop = longest - len(t.prompt_ids), longest + len(t.response_ids)
        ids[row, start:stop] = np.concatenate([t.prompt_ids, t.response_ids])
        mask[row, start:stop] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask), longest
