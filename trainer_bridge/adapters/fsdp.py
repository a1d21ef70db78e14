"""Weights of a module that FSDP2 shards (`torch.distributed.fsdp.fully_shard`).

Its parameters are DTensors: either all ranks gather a bucket of them at a time, or each sends
the rows it holds. FSDP: arXiv 2304.11277.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from engine.errors import UnsupportedOption
from engine.protocol import TensorPiece, TensorSpec
from kernels.torch_compat import local_part
from trainer_bridge.adapters.bucketing import (
    BUCKET_BYTES,
    even_share,
    in_buckets,
    on_wire,
    piece_of,
    wire_spec,
)
from trainer_bridge.adapters.buffers import sent_buffers, wire_dtype
from trainer_bridge.adapters.plain import bare_name


class FsdpSource:
    """A `WeightSource` over a module to which `fully_shard` was applied.

    dtype: of the parameters on the wire; None sends the parameters' own, often float32 masters.
    bucket_bytes: most bytes of parameters gathered at once, unless one alone is larger.
    """

    lasting = False

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        dtype: torch.dtype | None = None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._model = model
        self._dtype = dtype
        self._bucket_bytes = bucket_bytes

    def specs(self) -> list[TensorSpec]:
        """See `WeightSource`."""
        return [self._spec(name, parameter) for name, parameter in self._tensors()]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `WeightSource`; collective."""

        def num_bytes(item: tuple[str, torch.Tensor]) -> int:
            return item[1].numel() * item[1].element_size()

        for bucket in in_buckets(self._tensors(), num_bytes, self._bucket_bytes):
            # Shards are converted first: a gather in the dtype of the wire moves less.
            whole = [
                (name, _whole(on_wire(parameter, wire_dtype(name, self._dtype))))
                for name, parameter in bucket
            ]
            yield from whole
            del whole

    def shards(self) -> Iterator[tuple[TensorPiece, torch.Tensor]]:
        """See `WeightSource`. Raises UnsupportedOption, naming the parameter, for a placement
        whose local part is not one run of the flattened tensor, such as columns."""
        for name, parameter in self._tensors():
            start, flat = _local_run(name, parameter)
            if flat.numel():
                piece = piece_of(self._spec(name, parameter), start, start + flat.numel())
                yield piece, on_wire(flat, wire_dtype(name, self._dtype))

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Sharded parameters: a forward pass may have left some modules gathered. Then the buffers
        that travel, which every rank holds whole."""
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        for name, parameter in self._model.named_parameters():
            yield bare_name(name), parameter.detach()
        for name, buffer in sent_buffers(self._model):
            yield bare_name(name), buffer

    def _spec(self, name: str, parameter: torch.Tensor) -> TensorSpec:
        return wire_spec(name, parameter.shape, parameter.dtype, wire_dtype(name, self._dtype))


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _local_run(name: str, parameter: torch.Tensor) -> tuple[int, torch.Tensor]:
    """(start, elements) that this rank sends of a parameter, as a run of it laid out flat."""
    if not isinstance(parameter, DTensor):
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        start, stop = even_share(parameter.numel(), rank, size)
        return start, parameter.reshape(-1)[start:stop]
    _require_plain_placements(name, parameter)
    local = parameter.to_local()
    if not _is_first_replica(parameter):
        return 0, local.reshape(-1)[:0]
    shape, offset = local_part(parameter)
    if 0 in shape:
        return 0, local.reshape(-1)[:0]
    if not _is_one_run(parameter.shape, shape):
        raise UnsupportedOption(
            f"{name} is sharded as {parameter.placements}: this rank's part is no run of the "
            "flattened tensor; shard by the first dimension, or send whole tensors",
            field=name,
        )
    strides = [math.prod(parameter.shape[dim + 1 :]) for dim in range(len(shape))]
    start = sum(place * stride for place, stride in zip(offset, strides, strict=True))
    return start, local.reshape(-1)


def _require_plain_placements(name: str, parameter: DTensor) -> None:
    # Strided shards (FSDP over tensor parallelism) interleave rows of several ranks.
    odd = [p for p in parameter.placements if type(p) not in (Shard, Replicate)]
    if odd:
        raise UnsupportedOption(
            f"{name} has the placement {odd[0]}, whose parts are no runs of the flattened "
            "tensor; send whole tensors",
            field=name,
        )


def _is_first_replica(parameter: DTensor) -> bool:
    """Whether this rank is the one that sends, of those that hold the same part."""
    coordinate = parameter.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    pairs = zip(coordinate, parameter.placements, strict=True)
    return all(place == 0 for place, placement in pairs if isinstance(placement, Replicate))


def _is_one_run(shape: Sequence[int], local: Sequence[int]) -> bool:
    """Whether a block of `local` sizes is contiguous in a row-major tensor of `shape`: single
    indices, then one range, then whole dimensions."""
    cut = next((dim for dim, size in enumerate(local) if size != 1), len(local))
    return all(local[dim] == shape[dim] for dim in range(cut + 1, len(local)))
