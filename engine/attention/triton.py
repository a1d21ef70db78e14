"""Attention by our Triton kernels: paged decode and paged prefill on a GPU.

Legend: T tokens, R rows, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.attention.base import AttentionBatch
from engine.kv.pool import KVPool
from kernels.attention import paged_attention
from kernels.kv_copy import write_kv


class TritonBackend:
    """Back end over `kernels.attention` with its Triton kernels."""

    name = "triton"

    def __init__(self, pool: KVPool, *, scale: float) -> None:
        self._pool = pool
        self._scale = scale

    def prepare(self, batch: AttentionBatch) -> TritonStep:
        """Bring the row layout to the device in one copy."""
        packed = torch.from_numpy(batch.query_start_R1.astype("int32")).to(batch.device)
        rows = torch.from_numpy(batch.slots_R).to(batch.device)
        kv_lens = torch.from_numpy(batch.kv_lens_R.astype("int32")).to(batch.device)
        columns = -(-int(batch.kv_lens_R.max()) // batch.page_size)
        return TritonStep(
            pool=self._pool,
            scale=self._scale,
            write_slots_T=batch.write_slots_T,
            page_table_RP=batch.page_table[rows, :columns].contiguous(),
            query_start_R1=packed,
            kv_lens_R=kv_lens,
            max_query_len=int(batch.query_lens_R.max()),
        )


@dataclass(frozen=True)
class TritonStep:
    """One prepared step."""

    pool: KVPool
    scale: float
    write_slots_T: torch.Tensor
    page_table_RP: torch.Tensor
    query_start_R1: torch.Tensor
    kv_lens_R: torch.Tensor
    max_query_len: int

    def attend(
        self, layer_index: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> torch.Tensor:
        """Write this step's KV of the layer, then attend. Returns [T, H, D]."""
        k_NGKD, v_NGKD = self.pool.layer(layer_index)
        write_kv(k_TKD, v_TKD, k_NGKD, v_NGKD, self.write_slots_T, backend="triton")
        return paged_attention(
            q_THD,
            k_NGKD,
            v_NGKD,
            self.page_table_RP,
            self.query_start_R1,
            self.kv_lens_R,
            scale=self.scale,
            max_query_len=self.max_query_len,
            backend="triton",
        )
