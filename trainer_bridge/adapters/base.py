"""What a trainer is to the bridge: a source of full tensors, or of this rank's pieces of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from engine.errors import ManifestMismatch
from engine.protocol import TensorPiece, TensorSpec


class WeightSource(Protocol):
    """The weights of one trainer under their Hugging Face names.

    On a sharded trainer `tensors` is collective: every rank iterates it, in the same order, and
    the full tensors exist a few at a time. `shards` is not: it yields what this rank holds.
    """

    lasting: bool
    """Whether the tensors that `tensors` yields stay as they are until the update is committed,
    as a trainer's own parameters do, so that a receiver may read them in place until then.
    False for tensors that are gathered, converted or written into a buffer that is used again:
    each is read before the next is asked for."""

    def specs(self) -> list[TensorSpec]:
        """Name, dtype and full shape of every tensor, in the order of `tensors`."""
        ...

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each full tensor once; valid until the next is asked for unless `lasting`."""
        ...

    def shards(self) -> Iterator[tuple[TensorPiece, torch.Tensor]]:
        """This rank's pieces, each with its elements as a flat tensor [stop - start].

        The pieces of all ranks together cover every tensor once. Raises UnsupportedOption
        where the trainer's layout has no such pieces.
        """
        ...


def in_order(
    manifest: Sequence[TensorSpec], tensors: Iterator[tuple[str, torch.Tensor]]
) -> Iterator[torch.Tensor]:
    """The tensors of a source, each held against its announcement; for carriers that send them
    without their names.

    Raises ManifestMismatch, naming the tensor, where a source yields another name, shape or
    dtype than it announced, or ends early.
    """
    for spec in manifest:
        name, tensor = next(tensors, ("", None))
        if tensor is None:
            raise ManifestMismatch(f"{spec.name} was announced and did not come", field=spec.name)
        found = spec_of(name, tensor)
        if (found.name, found.dtype, found.shape) != (spec.name, spec.dtype, list(spec.shape)):
            raise ManifestMismatch(
                f"the source yields {found.name} as {found.dtype} {found.shape} where it "
                f"announced {spec.name} as {spec.dtype} {list(spec.shape)}",
                field=spec.name,
            )
        yield tensor


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """The announcement of a full tensor."""
    return TensorSpec(name, dtype_name(tensor.dtype), list(tensor.shape))


def whole_piece(spec: TensorSpec) -> TensorPiece:
    """The piece that is all of a tensor."""
    return TensorPiece(spec.name, spec.dtype, spec.shape)


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> 'bfloat16'."""
    return str(dtype).removeprefix("torch.")
