"""The routers of a transformers mixture of experts: where they are, and how they weigh experts.

A router gives (logits, weights, ids) of its tokens. `weigh` computes the weights of given ids from
the logits, as the router's own class does of those that it chose itself.

Legend: T tokens, E experts, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

Weigh = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
"""(router module, logits [T, E], ids int64 [T, K]) to weights [T, K]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Router:
    """One router. layer: of all decoder layers. num_experts: read before the model is sharded.
    sigmoid: scores are no softmax."""

    layer: int
    module: Any
    num_experts: int
    weigh: Weigh
    sigmoid: bool

    def shares(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """How strongly each token asks for each expert, float32 [T, E]; a token's sum is 1."""
        if not self.sigmoid:
            return logits_TE.softmax(dim=-1, dtype=torch.float32)
        scores_TE = logits_TE.float().sigmoid()
        return scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20)


def routers_of(model: torch.nn.Module) -> list[Router]:
    """The routers of a model by layer; none of a dense model, nor of a class that is not listed."""
    found = []
    for path, module in model.named_modules():
        weigh = _WEIGH.get(type(module).__name__)
        if weigh is not None:
            layer = int(path.partition(".layers.")[2].partition(".")[0])
            found.append(
                Router(
                    layer=layer,
                    module=module,
                    num_experts=module.weight.shape[0],
                    weigh=weigh,
                    sigmoid=weigh is _sigmoid,
                )
            )
    return sorted(found, key=lambda router: router.layer)


def _softmax(router: Any, logits_TE: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """Qwen2-MoE, Qwen3-MoE, OLMoE."""
    weights_TK = logits_TE.softmax(dim=-1, dtype=torch.float32).gather(1, ids_TK)
    if router.norm_topk_prob:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return weights_TK.to(logits_TE.dtype)


def _normalised_softmax(router: Any, logits_TE: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """Mixtral: always divided by their sum, and left in float32."""
    weights_TK = logits_TE.softmax(dim=-1, dtype=torch.float32).gather(1, ids_TK)
    return weights_TK / weights_TK.sum(dim=-1, keepdim=True)


def _scaled_softmax(router: Any, logits_TE: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """DeepSeek-V2. Its groups decide what is chosen, not what that weighs."""
    weights_TK = logits_TE.softmax(dim=-1, dtype=torch.float32).gather(1, ids_TK)
    return weights_TK * router.routed_scaling_factor


def _sigmoid(router: Any, logits_TE: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """DeepSeek-V3, GLM-4. The correction bias decides what is chosen, not what that weighs."""
    weights_TK = logits_TE.sigmoid().gather(1, ids_TK)
    if router.norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return weights_TK * router.routed_scaling_factor


_WEIGH: Mapping[str, Weigh] = MappingProxyType(
    {
        "Qwen2MoeTopKRouter": _softmax,
        "Qwen3MoeTopKRouter": _softmax,
        "OlmoeTopKRouter": _softmax,
        "MixtralTopKRouter": _normalised_softmax,
        "DeepseekV2TopkRouter": _scaled_softmax,
        "DeepseekV3TopkRouter": _sigmoid,
        "Glm4MoeTopkRouter": _sigmoid,
    }
)
"""By class of the router module."""
