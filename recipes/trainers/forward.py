"""Log-probabilities and values of response tokens from a transformers model over a prefix tree.

Legend: T nodes, P predicting nodes, K response tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from recipes.trainers.prefix_tree import BoolArray, PrefixTree

_SLIDING = "sliding_attention"
_ALL_LAYERS_SLIDE = ("mistral",)
"""Families whose layers all have the window of the configuration, without saying so."""


Head = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states [P, H] to values, float32 [P]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScores:
    """logprobs: float32 [K], with gradient where the model has one.

    entropy: float32 [K] of the distribution each token was drawn from, in nats, detached.
    values: float32 [K] of the state before each token, with gradient; None without a head.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor | None = None


def score_tree(
    model: Any, tree: PrefixTree, temperature: float, head: Head | None = None
) -> TokenScores:
    """log_softmax(logits / temperature)[token] of every response token of the tree.

    model: a transformers causal LM, or a wrapper that is called like one and has its `device`.
    It is called once, as a whole, which is what sharded models need; logits, and values of a
    `head`, are computed at the predicting nodes alone. The softmax is in float32, whatever the
    dtype of the model. The model must attend by SDPA, which takes boolean [1, 1, T, T] masks.
    """
    device = model.device
    predicting = torch.from_numpy(tree.predicting).to(device)
    output = _call(model, tree, device, keep=predicting, hidden=head is not None)
    logits_PV = output.logits[0].float() / temperature
    logsumexp_P = logits_PV.logsumexp(dim=-1)
    rows_K = torch.from_numpy(tree.rows).to(device)
    targets_K = torch.from_numpy(tree.targets).to(device)
    logprobs_K = logits_PV[rows_K, targets_K] - logsumexp_P[rows_K]
    with torch.no_grad():
        probs_PV = (logits_PV - logsumexp_P[:, None]).exp()
        entropy_P = logsumexp_P - (probs_PV * logits_PV).sum(dim=-1)
    values_K = None if head is None else head(_last_hidden(output)[predicting])[rows_K]
    return TokenScores(logprobs=logprobs_K, entropy=entropy_P[rows_K], values=values_K)


def value_tree(model: Any, tree: PrefixTree, head: Head, *, trunk: bool) -> torch.Tensor:
    """The value of the state before every response token of the tree, float32 [K].

    model: as for `score_tree`, its logits computed at one node alone; or a sequence classifier,
    which has one node's anyway. trunk: whether the model, and not just the head, has a gradient of
    them.
    """
    device = model.device
    predicting = torch.from_numpy(tree.predicting).to(device)
    rows_K = torch.from_numpy(tree.rows).to(device)
    with torch.set_grad_enabled(trunk and torch.is_grad_enabled()):
        output = _call(model, tree, device, keep=predicting[:1], hidden=True)
        hidden_PH = _last_hidden(output)[predicting]
    values_K = head(hidden_PH)[rows_K]
    # Sharded models want a gradient for every parameter, those behind the logits too.
    return values_K + 0.0 * output.logits.float().sum()


def _call(
    model: Any, tree: PrefixTree, device: torch.device, *, keep: torch.Tensor, hidden: bool
) -> Any:
    """One forward pass over the tree; logits at the nodes of `keep`."""
    return model(
        input_ids=torch.from_numpy(tree.token_ids).to(device)[None],
        position_ids=torch.from_numpy(tree.depths).to(device)[None],
        attention_mask=_attention_masks(model, tree, device),
        use_cache=False,
        logits_to_keep=keep,
        output_hidden_states=hidden,
    )


def _last_hidden(output: Any) -> torch.Tensor:
    """[T, H]: what the logits are computed from, behind the final norm."""
    hidden_TH: torch.Tensor = output.hidden_states[-1][0]
    return hidden_TH


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
