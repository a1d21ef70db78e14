"""The paged KV pool of one rank.

Legend: L layers, N pages, G tokens of a page, K kv heads, D head dim.
"""

from __future__ import annotations

import torch

from kernels.kv_copy import copy_pages


class KVPool:
    """K and V of every layer: two tensors [L, N, G, K, D].

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
    ) -> None:
        shape = (num_layers, num_pages, page_size, num_kv_heads, head_dim)
        self.page_size = page_size
        # Zeros, not garbage: masked positions of a page are multiplied by a weight of zero,
        # which a NaN would survive. On a CPU untouched zeros take no memory.
        self.k_LNGKD = torch.zeros(shape, dtype=dtype, device=device)
        self.v_LNGKD = torch.zeros(shape, dtype=dtype, device=device)

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

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V pages of one layer, each [N, G, K, D]."""
        return self.k_LNGKD[index], self.v_LNGKD[index]

    def copy(self, src_C: torch.Tensor, dst_C: torch.Tensor) -> None:
        """Copy whole pages `src` to `dst` in every layer (copy-on-write)."""
        copy_pages(self.k_LNGKD, self.v_LNGKD, src_C, dst_C)
