"""Attention by our Triton kernels: paged decode and paged prefill on a GPU.

Legend: T tokens, R rows, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.attention.base import AttentionBatch
from engine.kv.pool import KVPool
from engine.transfer import to_device
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
        starts, lens = len(batch.query_start_R1), len(batch.kv_lens_R)
        packed = np.concatenate([batch.query_start_R1, batch.kv_lens_R, batch.slots_R])
        query_start, kv_lens, rows = to_device(packed.astype("int32"), batch.device).split(
            [starts, lens, lens]
        )
        columns = -(-int(batch.kv_lens_R.max()) // batch.page_size)
        return TritonStep(
            pool=self._pool,
            scale=self._scale,
            write_slots_T=batch.write_slots_T,
            page_table_RP=batch.page_table[rows.long(), :columns].contiguous(),
            query_start_R1=query_start,
            kv_lens_R=kv_lens,
            max_query_len=int(batch.query_lens_R.max()),
        )

    def prepare_decode(
        self,
        *,
        slots_R: torch.Tensor,
        kv_lens_R: torch.Tensor,
        page_table: torch.Tensor,
        write_slots_R: torch.Tensor,
        query_start_R1: torch.Tensor,
        max_kv_len: int,
    ) -> TritonStep:
        """A step of one token a row whose layout is on the device already, all int32.

        page_table: that of all slots, [slots, P], read in place. query_start_R1: 0 to R.
        max_kv_len: bound on `kv_lens_R`, whatever these hold when the step runs.
        """
        return TritonStep(
            pool=self._pool,
            scale=self._scale,
            write_slots_T=write_slots_R,
            page_table_RP=page_table,
            query_start_R1=query_start_R1,
            kv_lens_R=kv_lens_R,
            max_query_len=1,
            table_rows_R=slots_R,
            max_kv_len=max_kv_len,
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
    table_rows_R: torch.Tensor | None = None
    max_kv_len: int | None = None

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
            table_rows_R=self.table_rows_R,
            max_kv_len=self.max_kv_len,
            backend="triton",
        )
