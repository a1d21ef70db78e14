"""Log-probabilities of response tokens from a transformers causal LM over a prefix tree.

Legend: T nodes, P predicting nodes, K response tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from recipes.trainers.prefix_tree import PrefixTree


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScores:
    """logprobs: float32 [K], with gradient where the model has one.

    entropy: float32 [K] of the distribution each token was drawn from, in nats, detached.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor


def score_tree(model: Any, tree: PrefixTree, temperature: float) -> TokenScores:
    """log_softmax(logits / temperature)[token] of every response token of the tree.

    model: a transformers causal LM, or a wrapper that is called like one and has its `device`.
    It is called once, as a whole, which is what sharded models need; logits are computed at
    the predicting nodes alone. The softmax is in float32, whatever the dtype of the model. The
    model must attend by SDPA, which takes a boolean [1, 1, T, T] mask.
    """
    device = model.device
    logits_PV = _logits(model, tree, device).float() / temperature
    logsumexp_P = logits_PV.logsumexp(dim=-1)
    rows_K = torch.from_numpy(tree.rows).to(device)
    targets_K = torch.from_numpy(tree.targets).to(device)
    logprobs_K = logits_PV[rows_K, targets_K] - logsumexp_P[rows_K]
    with torch.no_grad():
        probs_PV = (logits_PV - logsumexp_P[:, None]).exp()
        entropy_P = logsumexp_P - (probs_PV * logits_PV).sum(dim=-1)
    return TokenScores(logprobs=logprobs_K, entropy=entropy_P[rows_K])


def _logits(model: Any, tree: PrefixTree, device: torch.device) -> torch.Tensor:
    mask_TT = torch.from_numpy(tree.ancestor_mask()).to(device)
    output = model(
        input_ids=torch.from_numpy(tree.token_ids).to(device)[None],
        position_ids=torch.from_numpy(tree.depths).to(device)[None],
        attention_mask=mask_TT[None, None],
        use_cache=False,
        logits_to_keep=torch.from_numpy(tree.predicting).to(device),
    )
    logits_PV: torch.Tensor = output.logits[0]
    return logits_PV
