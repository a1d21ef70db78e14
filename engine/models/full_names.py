"""Full tensors of a model by their Hugging Face names: one each, or several in one.

A tensor's name is that of checkpoints. Where transformers has another name for it in memory, which
is what a trainer sends, that is its second name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from engine.layers.moe import MoeBlock
from engine.layers.parameter import SINGLE, ShardedParameter

Target = tuple[ShardedParameter, str]
"""A parameter and the key of one of its parts."""


@dataclass(frozen=True, kw_only=True)
class FusedTensor:
    """A full tensor that is others of the model, flat and one behind the other.

    shape: of the full tensor. names: of the others, in order.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]


def full_tensors(model: nn.Module) -> dict[str, Target]:
    """Every full tensor of a model's parameters by its Hugging Face name, and where it goes."""
    return {
        _full_name(on_disk, key): (parameter, key)
        for _, on_disk, parameter in _parameters(model)
        for key in parameter.parts
    }


def fused_tensors(model: nn.Module) -> dict[str, FusedTensor]:
    """The tensors that may come in place of several of `full_tensors`, by Hugging Face name."""
    return {
        f"{_parent(path)}.{leaf}": FusedTensor(
            shape=fused.shape, names=tuple(_full_name(on_disk, key) for key in fused.keys)
        )
        for path, on_disk, parameter in _parameters(model)
        for leaf, fused in parameter.fused.items()
    }


def second_names(model: nn.Module) -> dict[str, str]:
    """By the name that transformers has in memory for a tensor, its name in `full_tensors` where
    that is another."""
    return {
        path: on_disk
        for path, on_disk, parameter in _parameters(model)
        if path != on_disk and SINGLE in parameter.parts
    }


def _parameters(model: nn.Module) -> Iterator[tuple[str, str, ShardedParameter]]:
    """(path, the same by the names that checkpoints have for its modules, parameter) of each."""
    renamed = {
        f"{path}.": f"{path.rpartition('.')[0]}.{module.disk_name}."
        for path, module in model.named_modules()
        if isinstance(module, MoeBlock) and path.rpartition(".")[2] != module.disk_name
    }
    for path, parameter in model.named_parameters():
        if isinstance(parameter, ShardedParameter):
            block = next((prefix for prefix in renamed if path.startswith(prefix)), "")
            yield path, renamed.get(block, "") + path[len(block) :], parameter


def _full_name(path: str, key: str) -> str:
    if key == SINGLE:
        return path
    return f"{_parent(path)}.{key}.{path.rpartition('.')[2]}"


def _parent(path: str) -> str:
    """The module that has the parameter's module beside what it stands for."""
    return path.rpartition(".")[0].rpartition(".")[0]
