"""Tiny models with experts, and their weights by the names of files and by those in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.helpers.weight_engines import CONFIG, Tensors

SIZES = {
    **CONFIG,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {
        **SIZES,
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": 4,
        "shared_expert_intermediate_size": 8,
        "mlp_only_layers": [1],
    },
    "mixtral": {
        **{key: value for key, value in SIZES.items() if key != "moe_intermediate_size"},
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 4,
    },
    "glm4": {
        **SIZES,
        "architectures": ["Glm4MoeForCausalLM"],
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
    },
}
BIAS = "e_score_correction_bias"


def drawn(model: Any, seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """Full tensors by the names of files; those that choose experts are float32."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (parameter, part) in model.weight_index().items():
        values = torch.randn(parameter.parts[part].full_shape, generator=generator)
        found[name] = values if name.endswith(BIAS) else values.to(dtype)
    return found


def in_memory(model: Any, tensors: Tensors) -> Tensors:
    """The same as transformers names them: experts of a layer in two tensors."""
    left = dict(tensors)
    for name, fused in model.fused().items():
        parts = [left.pop(unit).flatten() for unit in fused.names]
        left[name] = torch.cat(parts).view(fused.shape)
    for second, name in model.aliases().items():
        left[second] = left.pop(name)
    return left


def mixed(model: Any, tensors: Tensors) -> Tensors:
    """The down projections together, everything else as in files."""
    left = dict(tensors)
    for name, fused in model.fused().items():
        if name.endswith("down_proj"):
            parts = [left.pop(unit).flatten() for unit in fused.names]
            left[name] = torch.cat(parts).view(fused.shape)
    return left


def as_files(model: Any, tensors: Tensors) -> Tensors:
    """Themselves."""
    return dict(tensors)


FORMS: dict[str, Callable[[Any, Tensors], Tensors]] = {
    "files": as_files,
    "memory": in_memory,
    "mixed": mixed,
}


def shuffled(tensors: Tensors, seed: int) -> Tensors:
    """The same in another order."""
    generator = torch.Generator().manual_seed(seed)
    names = list(tensors)
    order = torch.randperm(len(names), generator=generator).tolist()
    return {names[index]: tensors[names[index]] for index in order}
