"""Rows of one step over a pool of random KV: what `benchmarks/attention_backends.py` times.

Legend: as in `engine.attention.base`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from engine.attention.base import AttentionBatch, AttentionStep, DecodeLayout
from engine.attention.flashinfer import FlashInferBackend
from engine.attention.select import select
from engine.kv.layout import HeadLayout
from engine.kv.pool import KVPool
from kernels.attention import reference
from kernels.testing import RotatedHeads

PAGE = 16
LAYERS = 3
DTYPE = torch.bfloat16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BackendName = Literal["triton", "fa2", "fa3"]


@dataclass(frozen=True)
class Shape:
    """Heads of a model on one GPU."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int


SHAPES = {
    "0.5B": Shape("0.5B", 14, 2, 64),
    "1.5B": Shape("1.5B", 12, 2, 128),
    "8B": Shape("8B", 32, 8, 128),
}


@dataclass(frozen=True)
class Rows:
    """Rows of one step. groups: rows that share their first `shared` tokens, 0 for none."""

    name: str
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    group: int = 1
    shared: int = 0


def decode_rows(groups: int, samples: int, shared: int, own: int) -> Rows:
    """`groups` x `samples` rows of one token, `shared` + `own` tokens of KV."""
    rows = groups * samples
    name = f"{groups}x{samples} {shared}+{own}"
    return Rows(name, (1,) * rows, (shared + own,) * rows, group=samples, shared=shared)


def attend(step: AttentionStep, layer: int, *qkv: torch.Tensor) -> torch.Tensor:
    """Write the keys and values of a layer, then attend."""
    return step.attend(layer, step.writes.store(layer, RotatedHeads(*qkv)))


class Setup:
    """A pool of random KV and the page table of some rows, in random page order."""

    def __init__(self, shape: Shape, rows: Rows, layers: int = LAYERS) -> None:
        self.shape, self.rows = shape, rows
        self.query_lens = np.array(rows.query_lens, dtype=np.int64)
        self.kv_lens = np.array(rows.kv_lens, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.query_lens)])
        self.scale = shape.head_dim**-0.5
        num_rows, columns = len(self.kv_lens), -(-int(self.kv_lens.max()) // PAGE)
        ids = np.random.default_rng(0).permutation((num_rows + 1) * columns).astype(np.int32)
        self.table = ids.reshape(num_rows + 1, columns).copy()
        if rows.shared:
            common = rows.shared // PAGE
            leaders = np.arange(num_rows) // rows.group * rows.group
            self.table[:num_rows, :common] = self.table[leaders, :common]
        layout = HeadLayout(
            num_kv_heads=shape.kv_heads,
            key_dim=shape.head_dim,
            value_dim=shape.head_dim,
            dtype=DTYPE,
        )
        self.pool = KVPool([layout] * layers, num_pages=len(ids), page_size=PAGE, device=DEVICE)
        for pages in self.pool.tensors():
            pages.normal_()
        self.page_table = torch.from_numpy(self.table).to(DEVICE)
        self.write_slots = self._write_slots()

    def _write_slots(self) -> torch.Tensor:
        row = np.repeat(np.arange(len(self.kv_lens)), self.query_lens)
        first = np.repeat(self.kv_lens - self.query_lens - self.starts[:-1], self.query_lens)
        position = first + np.arange(self.starts[-1])
        slots = self.table[row, position // PAGE].astype(np.int64) * PAGE + position % PAGE
        return torch.from_numpy(slots).to(DEVICE)

    def batch(self) -> AttentionBatch:
        return AttentionBatch(
            query_start_R1=self.starts,
            kv_lens_R=self.kv_lens,
            slots_R=np.arange(len(self.kv_lens)),
            host_pages=self.table,
            page_table=self.page_table,
            write_slots_T=self.write_slots,
            page_size=PAGE,
            device=DEVICE,
        )

    def layout(self) -> tuple[DecodeLayout, np.ndarray, np.ndarray]:
        """Of a captured step over all rows, and what its `refresh` takes."""
        num_rows = len(self.kv_lens)
        slots, lens = np.arange(num_rows, dtype=np.int32), self.kv_lens.astype(np.int32)
        layout = DecodeLayout(
            rows=num_rows,
            slots_R=torch.from_numpy(slots).to(DEVICE),
            kv_lens_R=torch.from_numpy(lens).to(DEVICE),
            write_slots_R=self.write_slots,
            query_start_R1=torch.arange(num_rows + 1, dtype=torch.int32, device=DEVICE),
            page_table=self.page_table,
            host_pages=self.table,
            max_kv_len=int(lens.max()),
            page_size=PAGE,
        )
        return layout, slots, lens

    def qkv(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape, tokens = self.shape, int(self.starts[-1])
        sizes = [shape.heads, shape.kv_heads, shape.kv_heads]
        wide = torch.randn(tokens, sum(sizes), shape.head_dim, device=DEVICE, dtype=DTYPE)
        q, k, v = wide.split(sizes, dim=1)
        return q.contiguous(), k.contiguous(), v.contiguous()

    def backend(self, name: BackendName) -> Any:
        heads = self.shape.heads
        if name == "triton":
            options = {"num_heads": heads, "scale": self.scale, "device": DEVICE}
            return select("triton", self.pool, **options).backend
        return FlashInferBackend(
            self.pool, num_heads=heads, scale=self.scale, long_kernels=name, long_queries=0
        )

    def want(self, q: torch.Tensor) -> torch.Tensor:
        """Layer 0 in float32."""
        k_pages, v_pages = (pages.float() for pages in self.pool.layer(0))
        return reference.paged_attention(
            q.float(),
            k_pages,
            v_pages,
            torch.from_numpy(self.table),
            torch.from_numpy(self.starts),
            torch.from_numpy(self.kv_lens),
            self.scale,
        ).to(DTYPE)

    def flops(self) -> float:
        """Of the products of one layer, masked pairs not counted."""
        seen = self.kv_lens * self.query_lens - self.query_lens * (self.query_lens - 1) / 2
        return float(4 * self.shape.heads * self.shape.head_dim * seen.sum())

    def kv_bytes(self, *, share: bool) -> int:
        """KV of one layer read once a row, or shared pages once a group."""
        tokens = int(self.kv_lens.sum())
        if share and self.rows.shared:
            again = len(self.kv_lens) - len(self.kv_lens) // self.rows.group
            tokens -= again * self.rows.shared
        return 2 * 2 * self.shape.kv_heads * self.shape.head_dim * tokens
