"""The paged KV pool of one rank.

Legend: l layers of a piece, N pages; `...` the shape of a page of one part, see
`engine.kv.layout.PagePart`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from engine.kv.layout import KVLayout, PagePart
from engine.kv.spoilt import SpoiltPages
from kernels.kv_copy import copy_pages

PIECE_BYTES = 4 << 30
"""Largest allocation. A driver maps memory the faster the smaller its pieces: on an H100, 40 GiB
take 112 ms as one piece and 46 ms in pieces of 4 GiB, which is what waking up waits for."""


class KVPool:
    """What every layer keeps of every token, addressed by page: tensors [l, N, ...], each of some
    layers with the same parts.

    A page holds the same tokens in all layers. Which page holds what is decided by `rollout.cache`;
    this class only stores bytes.
    """

    def __init__(
        self,
        layouts: Sequence[KVLayout],
        *,
        num_pages: int,
        page_size: int,
        device: torch.device,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        """layouts: of each layer, in order. piece_bytes: of one allocation at most, unless one
        layer is larger."""
        self.layouts = tuple(layouts)
        self.num_pages = num_pages
        self.page_size = page_size
        self.device = device
        self.spoilt = SpoiltPages(num_pages)
        self.pieces: list[tuple[torch.Tensor, ...]] = []
        """The tensors of a piece, in the order of its layers' parts."""
        self._places: dict[int, tuple[int, int]] = {}
        for parts, layers in self._cut(piece_bytes):
            self._places.update({layer: (len(self.pieces), i) for i, layer in enumerate(layers)})
            self.pieces.append(tuple(self._allocate(part, len(layers)) for part in parts))

    def _cut(self, piece_bytes: int) -> Iterator[tuple[tuple[PagePart, ...], list[int]]]:
        """The layers of each piece, and the parts that they have."""
        groups: dict[tuple[PagePart, ...], list[int]] = {}
        for layer, layout in enumerate(self.layouts):
            groups.setdefault(layout.parts, []).append(layer)
        for parts, layers in groups.items():
            largest = max(part.token_bytes for part in parts) * self.page_size * self.num_pages
            each = max(1, piece_bytes // max(largest, 1))
            for first in range(0, len(layers), each):
                yield parts, layers[first : first + each]

    def _allocate(self, part: PagePart, num_layers: int) -> torch.Tensor:
        # Zeros, not garbage: masked positions of a page are multiplied by a weight of zero,
        # which a NaN would survive. On a CPU untouched zeros take no memory.
        shape = (num_layers, self.num_pages, *part.page_shape(self.page_size))
        return torch.zeros(shape, dtype=part.dtype, device=self.device)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of the pool, those of a piece in turn."""
        return [tensor for piece in self.pieces for tensor in piece]

    def layer(self, index: int) -> tuple[torch.Tensor, ...]:
        """The pages of one layer, [N, ...] of each part of its layout."""
        piece, within = self._places[index]
        return tuple(tensor[within] for tensor in self.pieces[piece])

    def copy(self, src_C: torch.Tensor, dst_C: torch.Tensor) -> None:
        """Copy whole pages `src` to `dst` in every layer (copy-on-write)."""
        copy_pages(self.tensors(), src_C, dst_C)
