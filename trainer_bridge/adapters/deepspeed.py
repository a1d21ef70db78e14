"""Weights of a module that DeepSpeed trains, ZeRO stages 0 to 3 (arXiv 1910.02054).

Up to stage 2 every rank holds all parameters. Under stage 3 a parameter is cut into equal flat
parts, the last one padded: ranks either gather a bucket of them at a time, or each sends its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from engine.errors import UnsupportedOption
from engine.protocol import TensorPiece, TensorSpec
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


class DeepSpeedSource:
    """A `WeightSource` over a DeepSpeedEngine, or the module that one was built from.

    dtype: of the parameters on the wire; None sends the module's own. bucket_bytes: most bytes of
    parameters gathered at once under ZeRO-3, unless one alone is larger.
    """

    def __init__(
        self,
        engine: torch.nn.Module,
        *,
        dtype: torch.dtype | None = None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._model = engine
        self._dtype = dtype
        self._bucket_bytes = bucket_bytes
        self.lasting = not any(
            _is_partitioned(tensor) or tensor.dtype != (wire_dtype(name, dtype) or tensor.dtype)
            for name, tensor in self._tensors()
        )

    def specs(self) -> list[TensorSpec]:
        """See `WeightSource`."""
        return [self._spec(name, parameter) for name, parameter in self._tensors()]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `WeightSource`; collective under ZeRO-3."""

        def num_bytes(item: tuple[str, Any]) -> int:
            return _numel(item[1]) * int(item[1].element_size())

        for bucket in in_buckets(self._tensors(), num_bytes, self._bucket_bytes):
            with _gathered([parameter for _, parameter in bucket]):
                for name, parameter in bucket:
                    yield name, on_wire(parameter.detach(), wire_dtype(name, self._dtype))

    def shards(self) -> Iterator[tuple[TensorPiece, torch.Tensor]]:
        """See `WeightSource`. Raises UnsupportedOption for parameters offloaded to NVMe."""
        for name, parameter in self._tensors():
            spec = self._spec(name, parameter)
            if _is_partitioned(parameter):
                start, flat = _partition(name, parameter)
            else:
                start, flat = _replica_share(parameter)
            if flat.numel():
                piece = piece_of(spec, start, start + flat.numel())
                yield piece, on_wire(flat, wire_dtype(name, self._dtype))

    def _tensors(self) -> Iterator[tuple[str, Any]]:
        for name, parameter in self._model.named_parameters():
            yield bare_name(name), parameter
        for name, buffer in sent_buffers(self._model):
            yield bare_name(name), buffer

    def _spec(self, name: str, parameter: Any) -> TensorSpec:
        shape = parameter.ds_shape if _is_partitioned(parameter) else parameter.shape
        return wire_spec(name, shape, parameter.dtype, wire_dtype(name, self._dtype))


def _is_partitioned(parameter: Any) -> bool:
    return hasattr(parameter, "ds_id")


def _numel(parameter: Any) -> int:
    return int(parameter.ds_numel if _is_partitioned(parameter) else parameter.numel())


def _gathered(parameters: list[Any]) -> AbstractContextManager[Any]:
    """Context in which these parameters are whole on every rank; none may be changed."""
    if not any(_is_partitioned(parameter) for parameter in parameters):
        return nullcontext()
    library: Any = importlib.import_module("deepspeed")
    gathered: AbstractContextManager[Any] = library.zero.GatheredParameters(parameters)
    return gathered


def _partition(name: str, parameter: Any) -> tuple[int, torch.Tensor]:
    """(start, this rank's elements) of a ZeRO-3 parameter, the padding cut off."""
    part = parameter.ds_tensor
    if part.status.name != "AVAILABLE":
        raise UnsupportedOption(
            f"{name} is offloaded to NVMe; offload parameters to the CPU, or send whole tensors",
            field=name,
        )
    start = min(dist.get_rank(parameter.ds_process_group) * part.ds_numel, parameter.ds_numel)
    return start, part.detach().view(-1)[: parameter.ds_numel - start]


def _replica_share(parameter: torch.Tensor) -> tuple[int, torch.Tensor]:
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    start, stop = even_share(parameter.numel(), rank, size)
    return start, parameter.detach().reshape(-1)[start:stop]
