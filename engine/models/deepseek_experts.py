"""The experts of DeepSeek-V2 (arXiv:2405.04434) and V3 (arXiv:2412.19437), which GLM-4 has too.

Their attention (MLA) is not built: what a config.json of theirs says of experts is read here, and
the blocks are those of other families. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from engine.errors import CheckpointError, UnknownArchitecture
from engine.layers.kinds import DenseMLPKind, MoeKind, SharedExpertKind
from engine.models.config_keys import number, whole_number
from engine.models.mixtures import chosen, one_of, switched
from kernels.routing import RoutingRule

_COUNT_KEYS = ("n_routed_experts", "num_local_experts")
_SIZE_KEY = "moe_intermediate_size"
_V2_METHODS: Mapping[str, Literal["none", "max"]] = MappingProxyType(
    {"greedy": "none", "group_limited_greedy": "max"}
)
V3_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 8,
        "routed_scaling_factor": 2.5,
        "topk_group": 4,
    }
)
"""What transformers takes for keys that a config.json of DeepSeek-V3 leaves out."""
V3_READS = frozenset({*_COUNT_KEYS, *V3_DEFAULTS})


def v3_experts(source: Mapping[str, Any], default_count: int) -> MoeKind:
    """Of DeepSeek-V3 and GLM-4: sigmoids, a bias that chooses only, groups by their two best.

    Raises CheckpointError naming the key for numbers that do not go together.
    """
    key, num_experts = one_of(source, _COUNT_KEYS, default_count)
    num_groups = whole_number(source, "n_group")
    return MoeKind(
        routing=RoutingRule(
            num_experts=num_experts,
            top_k=chosen(source, num_experts, key),
            score="sigmoid",
            normalised=switched(source, "norm_topk_prob"),
            wide_logits=True,
            scale=number(source, "routed_scaling_factor"),
            group_score="none" if num_groups == 1 else "top2_sum",
            num_groups=num_groups,
            top_groups=_top_groups(source, num_experts, num_groups, least_size=2),
        ),
        intermediate_size=whole_number(source, _SIZE_KEY),
        shared=_shared(source),
        chosen_by_bias=True,
        count_key=key,
    )


def v2_experts(source: Mapping[str, Any]) -> MoeKind:
    """Of DeepSeek-V2: softmax, weights that are scaled and never normalised, groups by their best.

    Raises CheckpointError naming the key for numbers that do not go together, UnknownArchitecture
    for a `topk_method` that is not served.
    """
    key, num_experts = one_of(source, _COUNT_KEYS, 64)
    method = source.get("topk_method", "greedy")
    if method not in _V2_METHODS:
        raise UnknownArchitecture(
            f"topk_method {method!r} is not served; known: {', '.join(_V2_METHODS)}",
            field="topk_method",
        )
    num_groups = top_groups = 1
    if _V2_METHODS[method] != "none":
        num_groups = whole_number(source, "n_group")
        top_groups = _top_groups(source, num_experts, num_groups, least_size=1)
    return MoeKind(
        routing=RoutingRule(
            num_experts=num_experts,
            top_k=chosen(source, num_experts, key),
            wide_logits=True,
            scale=number(source, "routed_scaling_factor"),
            group_score=_V2_METHODS[method],
            num_groups=num_groups,
            top_groups=top_groups,
        ),
        intermediate_size=whole_number(source, _SIZE_KEY),
        shared=_shared(source),
        count_key=key,
    )


def _shared(source: Mapping[str, Any]) -> SharedExpertKind:
    size = whole_number(source, "n_shared_experts") * whole_number(source, _SIZE_KEY)
    mlp = DenseMLPKind(intermediate_size=size, size_key=_SIZE_KEY)
    return SharedExpertKind(name="shared_experts", mlp=mlp)


def _top_groups(
    source: Mapping[str, Any], num_experts: int, num_groups: int, *, least_size: int
) -> int:
    """`topk_group`, which with `n_group` has to leave as many experts as a token goes to."""
    if num_experts % num_groups or (num_groups > 1 and num_experts // num_groups < least_size):
        raise CheckpointError(
            f"'n_group' is {num_groups}, which does not divide {num_experts} experts into groups "
            f"of {least_size} or more",
            field="n_group",
        )
    top_groups, top_k = (
        whole_number(source, "topk_group"),
        whole_number(source, "num_experts_per_tok"),
    )
    if top_groups > num_groups or top_groups * (num_experts // num_groups) < top_k:
        raise CheckpointError(
            f"'topk_group' is {top_groups}: that many of {num_groups} groups of "
            f"{num_experts // num_groups} do not hold {top_k} experts",
            field="topk_group",
        )
    return top_groups
