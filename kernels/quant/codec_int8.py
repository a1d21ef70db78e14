"""Weights as int8 with one float32 scale an output channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.backend import KernelBackend
from kernels.quant.codec import Index
from kernels.quant.rows import quantize_rows


class Int8Rows:
    """Each row of a matrix, of whatever leading dims, by `quantize_rows`: int8 [..., O, I] and
    float32 [..., O].

    A row's scale is that of the whole row of the full tensor, so that ranks which divide its
    columns store what one rank alone would.
    """

    name = "int8"
    range_dtype = torch.float32
    scale_leaf = "weight_scale"

    def takes(self, dtype: torch.dtype) -> bool:
        """See `Codec`."""
        return dtype.is_floating_point or dtype == torch.int8

    def copies(self, dtype: torch.dtype) -> bool:
        """See `Codec`."""
        return False

    def views(self, storages: Sequence[torch.Tensor], target: Index) -> tuple[torch.Tensor, ...]:
        """See `Codec`."""
        return storages[0][target], storages[1][target[:-1]]

    def encode(self, full: torch.Tensor, source: Index) -> tuple[torch.Tensor, ...]:
        """See `Codec`."""
        return _encode(full[source[:-1]], source[-1])

    def reads(self, source: Index, shape: tuple[int, ...]) -> Index:
        """See `Codec`: whole rows, whose largest element is their scale."""
        return *source[:-1], slice(0, shape[-1])

    def write(self, targets: Sequence[torch.Tensor], full: torch.Tensor, source: Index) -> None:
        """See `Codec`. Rows travel as they came, and are quantised where they are stored."""
        rows = full[source[:-1]].to(targets[0].device)
        quantized, scale = targets
        if quantized.shape == rows.shape and quantized.is_contiguous() and scale.is_contiguous():
            quantize_rows(rows, backend=_backend(rows), out=(quantized, scale))
            return
        for target, new in zip(targets, _encode(rows, source[-1]), strict=True):
            target.copy_(new)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """See `Codec`: one a row, as checkpoints have them."""
        return (*shape[:-1], 1)

    def write_encoded(
        self,
        targets: Sequence[torch.Tensor],
        full: torch.Tensor,
        scales: torch.Tensor,
        source: Index,
    ) -> None:
        """See `Codec`."""
        targets[0].copy_(full[source])
        targets[1].copy_(scales[..., 0][source[:-1]])

    def decode(self, stored: Sequence[torch.Tensor], rows: int) -> torch.Tensor:
        """See `Codec`."""
        quantized, scale = stored[0][:rows], stored[1][:rows]
        return quantized.float() * scale[..., None]


def _backend(rows: torch.Tensor) -> KernelBackend:
    return "triton" if rows.is_cuda else "torch"


def _encode(rows: torch.Tensor, columns: slice | int) -> tuple[torch.Tensor, ...]:
    quantized, scale = quantize_rows(rows, backend=_backend(rows))
    return quantized[..., columns], scale
