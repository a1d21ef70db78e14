"""Weights of an unsharded torch module, by the Hugging Face names of its parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from engine.protocol import TensorPiece, TensorSpec
from trainer_bridge.adapters.base import spec_of


class PlainSource:
    """A `WeightSource` over a module that this process holds whole.

    rank, world_size: of trainer ranks that all hold the same whole module (data parallel):
    `shards` then divides the elements among them, so that every rank sends its own part.
    """

    lasting = True

    def __init__(self, model: torch.nn.Module, *, rank: int = 0, world_size: int = 1) -> None:
        self._model = model
        self._rank = rank
        self._world_size = world_size

    def specs(self) -> list[TensorSpec]:
        """See `WeightSource`."""
        return [spec_of(name, tensor) for name, tensor in self.tensors()]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `WeightSource`."""
        return named_tensors(self._model)

    def shards(self) -> Iterator[tuple[TensorPiece, torch.Tensor]]:
        """Equal runs of each flattened tensor; see `WeightSource`."""
        for name, tensor in self.tensors():
            spec = spec_of(name, tensor)
            size = math.prod(spec.shape)
            per_rank = -(-size // self._world_size)
            start = min(self._rank * per_rank, size)
            stop = min(start + per_rank, size)
            if start < stop:
                piece = TensorPiece(name, spec.dtype, spec.shape, start, stop)
                yield piece, tensor.reshape(-1)[start:stop]


def named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter once, detached, under its own name.

    A tensor that several modules share (tied embeddings) comes under its first name only;
    the engine knows its aliases. Wrappers that prefix names (`torch.compile` adds
    `_orig_mod.`, DistributedDataParallel `module.`) are looked through.
    """
    for name, parameter in model.named_parameters():
        yield bare_name(name), parameter.detach()


def bare_name(name: str) -> str:
    """A parameter's name without the prefixes of wrappers."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    return ".".join(parts[1:] if parts[0] == "module" else parts)
