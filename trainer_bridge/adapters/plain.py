"""Weights of an unsharded torch module, by the Hugging Face names of its tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.protocol import TensorPiece, TensorSpec
from trainer_bridge.adapters.bucketing import even_share, on_wire, piece_of, wire_spec
from trainer_bridge.adapters.buffers import sent_buffers, wire_dtype


class PlainSource:
    """A `WeightSource` over a module that this process holds whole.

    dtype: of the parameters on the wire; None sends the module's own. rank, world_size: of trainer
    ranks that all hold the same whole module (data parallel): `shards` then divides the elements
    among them, so that every rank sends its own part.
    """

    lasting = True

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        dtype: torch.dtype | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._model = model
        self._dtype = dtype
        self._rank = rank
        self._world_size = world_size
        if any(
            tensor.dtype != (wire_dtype(name, dtype) or tensor.dtype)
            for name, tensor in named_tensors(model)
        ):
            self.lasting = False

    def specs(self) -> list[TensorSpec]:
        """See `WeightSource`."""
        return [
            wire_spec(name, tensor.shape, tensor.dtype, wire_dtype(name, self._dtype))
            for name, tensor in named_tensors(self._model)
        ]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `WeightSource`."""
        for name, tensor in named_tensors(self._model):
            yield name, on_wire(tensor, wire_dtype(name, self._dtype))

    def shards(self) -> Iterator[tuple[TensorPiece, torch.Tensor]]:
        """Equal runs of each flattened tensor; see `WeightSource`."""
        for name, tensor in named_tensors(self._model):
            start, stop = even_share(tensor.numel(), self._rank, self._world_size)
            if start < stop:
                wire = wire_dtype(name, self._dtype)
                spec = wire_spec(name, tensor.shape, tensor.dtype, wire)
                run = tensor.reshape(-1)[start:stop]
                yield piece_of(spec, start, stop), on_wire(run, wire)


def named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter once, detached, under its own name; then the buffers that travel.

    A tensor that several modules share (tied embeddings) comes under its first name only;
    the engine knows its aliases. Wrappers that prefix names (`torch.compile` adds
    `_orig_mod.`, DistributedDataParallel `module.`) are looked through.
    """
    for name, parameter in model.named_parameters():
        yield bare_name(name), parameter.detach()
    for name, buffer in sent_buffers(model):
        yield bare_name(name), buffer


def bare_name(name: str) -> str:
    """A parameter's name without the prefixes of wrappers."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    return ".".join(parts[1:] if parts[0] == "module" else parts)
