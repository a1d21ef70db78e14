"""What the weights of a mixture of experts are called in a file, and in a transformers model.

transformers keeps the experts of a layer in two tensors, `experts.gate_up_proj` [E, 2I, H], gate
rows before up rows, and `experts.down_proj` [E, H, I]; files have one tensor for each expert and
projection, and Mixtral's have names of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

_KINDS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_MIXTRAL_BACK = {kind: leaf for leaf, kind in _MIXTRAL.items()}
_MIXTRAL_EXPERT = re.compile(r"\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight$")
_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.(\w+_proj)\.weight$")


def parts_of(name: str, whole: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a file that together are one in a model: name and view of each, named as
    most families' files do; {} for a tensor that is one in a file too."""
    stem, _, leaf = name.rpartition(".")
    kinds = _KINDS.get(leaf, ())
    if not kinds or not stem.endswith(".experts") or whole.dim() != 3:
        return {}
    return {
        f"{stem}.{expert}.{kind}.weight": rows
        for expert, matrix in enumerate(whole.detach())
        for kind, rows in zip(kinds, matrix.chunk(len(kinds)), strict=True)
    }


def name_in_model(name: str) -> str:
    """A name of Mixtral's files as other families have it; another as it is."""
    name = _MIXTRAL_EXPERT.sub(lambda m: f".mlp.experts.{m[1]}.{_MIXTRAL[m[2]]}.weight", name)
    return name.replace(".block_sparse_moe.gate.", ".mlp.gate.")


def in_file(name: str, tensor: torch.Tensor, model_type: str) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor of a model as the files of its family have it: names, and the tensor or views."""
    for label, part in (parts_of(name, tensor) or {name: tensor}).items():
        yield (_mixtral_name(label) if model_type == "mixtral" else label), part


def _mixtral_name(name: str) -> str:
    """Inverse of `name_in_model`, of a name of Mixtral's model."""

    def rename(match: re.Match[str]) -> str:
        return f".block_sparse_moe.experts.{match[1]}.{_MIXTRAL_BACK[match[2]]}.weight"

    return _EXPERT.sub(rename, name).replace(".mlp.gate.", ".block_sparse_moe.gate.")
