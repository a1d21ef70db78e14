"""Log-probabilities of response tokens from a transformers causal LM over a prefix tree.

Legend: T nodes, P predicting nodes, K response tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from recipes.trainers.prefix_tree import BoolArray, PrefixTree

_SLIDING = "sliding_attention"
_ALL_LAYERS_SLIDE = ("mistral",)
"""Families whose layers all have the window of the configuration, without saying so."""


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
    model must attend by SDPA, which takes boolean [1, 1, T, T] masks.
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
    output = model(
        input_ids=torch.from_numpy(tree.token_ids).to(device)[None],
        position_ids=torch.from_numpy(tree.depths).to(device)[None],
        attention_mask=_attention_masks(model, tree, device),
        use_cache=False,
        logits_to_keep=torch.from_numpy(tree.predicting).to(device),
    )
    logits_PV: torch.Tensor = output.logits[0]
    return logits_PV


def _attention_masks(
    model: Any, tree: PrefixTree, device: torch.device
) -> torch.Tensor | dict[str, torch.Tensor]:
    """The mask of all layers, or one for each of the model's `layer_types`.

    transformers takes a mask of four dimensions as it is, so the sliding windows that it would
    have added are added here.
    """
    # A wrapper has settings of its own under that name.
    config = getattr(model, "module", model).config
    if config.model_type in _ALL_LAYERS_SLIDE:
        window = config.sliding_window
        return _as_mask(
            tree.ancestor_mask() if window is None else tree.window_mask(window), device
        )
    types = set(getattr(config, "layer_types", None) or ())
    full = _as_mask(tree.ancestor_mask(), device)
    if _SLIDING in types:
        window = _as_mask(tree.window_mask(config.sliding_window), device)
        return {kind: window if kind == _SLIDING else full for kind in types}
    return full


def _as_mask(mask_TT: BoolArray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(mask_TT).to(device)[None, None]
