"""Full tensors of a model by their Hugging Face names: one each, or several in one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

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
        _full_name(path, key): (parameter, key)
        for path, parameter in _parameters(model)
        for key in parameter.parts
    }


def fused_tensors(model: nn.Module) -> dict[str, FusedTensor]:
    """The tensors that may come in place of several of `full_tensors`, by Hugging Face name."""
    return {
        f"{_parent(path)}.{leaf}": FusedTensor(
            shape=fused.shape, names=tuple(_full_name(path, key) for key in fused.keys)
        )
        for path, parameter in _parameters(model)
        for leaf, fused in parameter.fused.items()
    }


def _parameters(model: nn.Module) -> Iterator[tuple[str, ShardedParameter]]:
    for path, parameter in model.named_parameters():
        if isinstance(parameter, ShardedParameter):
            yield path, parameter


def _full_name(path: str, key: str) -> str:
    if key == SINGLE:
        return path
    return f"{_parent(path)}.{key}.{path.rpartition('.')[2]}"


def _parent(path: str) -> str:
    """The module that has the parameter's module beside what it stands for."""
    return path.rpartition(".")[0].rpartition(".")[0]
