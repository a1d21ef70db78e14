"""How the values of a full tensor become the bytes that an engine stores, and come back.

A codec is one arithmetic. Whoever stores weights (the loader, an update), whoever computes what an
engine stores (a trainer that compares checksums) and whoever reads a weight back call the same
one, so that they agree to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

Index = tuple[slice | int, ...]
"""Indexes a tensor: one entry for every dim. A slice may have a step; an integer drops its dim."""


class Codec(Protocol):
    """Between full tensors and the storages that hold a rank's elements of them.

    All that is stored of a tensor is told by its values alone, element by element or with the
    elements beside them: not by what else is stored, nor by where ranks cut it. What is NaN or inf
    in the tensor is so in a storage of floats, and nothing else is.
    """

    name: str
    """By which `kernels.quant.codec_named` finds it."""

    @property
    def range_dtype(self) -> torch.dtype:
        """The float dtype whose largest value bounds what can be stored."""
        ...

    @property
    def scale_leaf(self) -> str:
        """The last word of the name under which scales come beside a tensor `...weight` that is
        encoded already; "" where there are none."""
        ...

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether tensors of `dtype` can be stored: floats, and what is encoded already."""
        ...

    def copies(self, dtype: torch.dtype) -> bool:
        """Whether elements of `dtype` are stored as they come, bit for bit, in one storage."""
        ...

    def views(self, storages: Sequence[torch.Tensor], target: Index) -> tuple[torch.Tensor, ...]:
        """What is stored for the elements `target` of the first storage: a view of each."""
        ...

    def encode(self, full: torch.Tensor, source: Index) -> tuple[torch.Tensor, ...]:
        """What is stored for the elements `source` of a full float tensor of any dtype, as
        `views` orders it; where the tensor is."""
        ...

    def reads(self, source: Index, shape: tuple[int, ...]) -> Index:
        """The elements of a full tensor of `shape` that `write` looks at for the elements
        `source`: those, and what decides how they are stored."""
        ...

    def write(self, targets: Sequence[torch.Tensor], full: torch.Tensor, source: Index) -> None:
        """`encode` into `targets`, which may be on another device."""
        ...

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the scales that come beside a full tensor of `shape`."""
        ...

    def write_encoded(
        self,
        targets: Sequence[torch.Tensor],
        full: torch.Tensor,
        scales: torch.Tensor,
        source: Index,
    ) -> None:
        """`write` what is encoded already: the bits of `full`, and its `scales`."""
        ...

    def decode(self, stored: Sequence[torch.Tensor], rows: int) -> torch.Tensor:
        """The values, in a float dtype, of the first `rows` along the first dim of what `views`
        gave or `encode` returned."""
        ...


class Plain:
    """Elements as they are, rounded to the storage's dtype where they come in another one."""

    name = "plain"
    scale_leaf = ""

    def __init__(self, dtype: torch.dtype) -> None:
        self.range_dtype = dtype

    def takes(self, dtype: torch.dtype) -> bool:
        """See `Codec`."""
        return dtype.is_floating_point

    def copies(self, dtype: torch.dtype) -> bool:
        """See `Codec`."""
        return dtype == self.range_dtype

    def views(self, storages: Sequence[torch.Tensor], target: Index) -> tuple[torch.Tensor, ...]:
        """See `Codec`."""
        return (storages[0][target],)

    def encode(self, full: torch.Tensor, source: Index) -> tuple[torch.Tensor, ...]:
        """See `Codec`."""
        return (full[source].to(self.range_dtype),)

    def reads(self, source: Index, shape: tuple[int, ...]) -> Index:
        """See `Codec`."""
        return source

    def write(self, targets: Sequence[torch.Tensor], full: torch.Tensor, source: Index) -> None:
        """See `Codec`."""
        targets[0].copy_(full[source])

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Not asked for: there are no scales."""
        raise AssertionError

    def write_encoded(
        self,
        targets: Sequence[torch.Tensor],
        full: torch.Tensor,
        scales: torch.Tensor,
        source: Index,
    ) -> None:
        """Not asked for: nothing is encoded."""
        raise AssertionError

    def decode(self, stored: Sequence[torch.Tensor], rows: int) -> torch.Tensor:
        """See `Codec`."""
        return stored[0][:rows]
