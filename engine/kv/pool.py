"""The paged KV pool of one rank.

Legend: L layers, l layers of a piece, N pages, G tokens of a page, K kv heads, D head dim.
"""

from __future__ import annotations

import torch

from engine.kv.spoilt import SpoiltPages
from kernels.kv_copy import copy_pages

PIECE_BYTES = 4 << 30
"""Largest allocation. A driver maps memory the faster the smaller its pieces: on an H100, 40 GiB
take 112 ms as one piece and 46 ms in pieces of 4 GiB, which is what waking up waits for."""


class KVPool:
    """K and V of every layer: tensors [l, N, G, K, D], each of some consecutive layers.

    Which page holds what is decided by `rollout.cache`; this class only stores bytes.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        """piece_bytes: of one allocation at most, unless one layer is larger."""
        layer_shape = (num_pages, page_size, num_kv_heads, head_dim)
        layer_bytes = num_pages * page_size * num_kv_heads * head_dim * dtype.itemsize
        self.num_pages = num_pages
        self.page_size = page_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.device = device
        self.spoilt = SpoiltPages(num_pages)
        self._layers_per_piece = max(1, min(num_layers, piece_bytes // max(layer_bytes, 1)))
        # Zeros, not garbage: masked positions of a page are multiplied by a weight of zero,
        # which a NaN would survive. On a CPU untouched zeros take no memory.
        self.pieces: list[tuple[torch.Tensor, torch.Tensor]] = []
        for first in range(0, num_layers, self._layers_per_piece):
            shape = (min(self._layers_per_piece, num_layers - first), *layer_shape)
            k_lNGKD = torch.zeros(shape, dtype=dtype, device=device)
            self.pieces.append((k_lNGKD, torch.zeros_like(k_lNGKD)))

    @staticmethod
    def page_bytes(
        *,
        num_layers: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> int:
        """Bytes of one page over all layers, K and V."""
        return 2 * num_layers * page_size * num_kv_heads * head_dim * dtype.itemsize

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of the pool, K and V of a piece in turn."""
        return [tensor for piece in self.pieces for tensor in piece]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V pages of one layer, each [N, G, K, D]."""
        piece, within = divmod(index, self._layers_per_piece)
        k_lNGKD, v_lNGKD = self.pieces[piece]
        return k_lNGKD[within], v_lNGKD[within]

    def copy(self, src_C: torch.Tensor, dst_C: torch.Tensor) -> None:
        """Copy whole pages `src` to `dst` in every layer (copy-on-write)."""
        for k_lNGKD, v_lNGKD in self.pieces:
            copy_pages(k_lNGKD, v_lNGKD, src_C, dst_C)
