"""Attention by FlashInfer (optional): paged prefill and paged decode on its tensor-core kernels.

FlashInfer (Ye et al., arXiv 2501.01005) splits a call in two: `plan` looks at the lengths on the
host and lays out the work, once a step; `run` is then one or two kernels a layer. Its tables are
ragged: the pages of all rows one after the other, and where each row's begin. KV is written by
our own kernel, into the same pages.

Numerics: with the FA2 kernels, `plan` cuts a row's KV into pieces whose size depends on the
lengths of all rows of the batch, so in its last bits what a row gets depends on its batch; the
Triton back end makes no such exception (docs/numerics.md). The FA3 prefill kernels do not cut
KV.

Legend: T tokens, R rows, U pages of all rows together, P page columns, H query heads, K kv heads,
D head dim, N pages of the pool, G tokens of a page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.attention.base import AttentionBatch, AttentionStep, DecodeLayout
from engine.attention.context import PoolWrites
from engine.kv.layout import common_heads
from engine.kv.pool import KVPool
from engine.transfer import to_device

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)

# Queries a row, on average, from which a step takes the FA3 kernels on a Hopper GPU. They fill
# tiles of 128 queries of one head; FA2 packs the heads of a group into tiles as small as 16.
LONG_QUERIES = 64

_FLOAT_BYTES = 4
_CTAS_PER_SM = 2
_LARGEST_TILE = 128
# Of one decode wrapper: five int32 arrays of its rows and work items, 13 bytes an item.
_DECODE_INT_BYTES = 2 << 20


@dataclass(frozen=True)
class PagedRows:
    """The KV of rows as FlashInfer reads it, all int32 on the host.

    indptr_R1: row r's pages are indices_U[indptr[r] : indptr[r + 1]]. last_R: tokens in each
    row's last page, 1 to G.
    """

    indptr_R1: np.ndarray
    indices_U: np.ndarray
    last_R: np.ndarray


def paged_rows(
    host_pages: np.ndarray, slots_R: np.ndarray, kv_lens_R: np.ndarray, page_size: int
) -> PagedRows:
    """Gather the rows' page ids out of the table of all slots, int32 [slots, P].

    kv_lens_R: tokens of each row, at least 1. Vectorised: 1,024 rows of 90 pages take about
    0.25 ms, half of that where all rows have as many pages.
    """
    num_pages_R = -(-kv_lens_R // page_size)
    indptr = np.zeros(len(slots_R) + 1, dtype=np.int32)
    np.cumsum(num_pages_R, out=indptr[1:])
    widest = int(num_pages_R.max())
    pages = host_pages[slots_R, :widest]
    if indptr[-1] == pages.size:
        indices = pages.reshape(-1)
    else:
        indices = pages[np.arange(widest) < num_pages_R[:, None]]
    last = kv_lens_R - (num_pages_R - 1) * page_size
    return PagedRows(indptr, indices, last.astype(np.int32))


def workspace_bytes(
    *, num_heads: int, num_kv_heads: int, head_dim: int, max_rows: int, num_sms: int
) -> int:
    """Bytes that partial results of the FA2 kernels may take.

    A plan has one work item a tile of queries and piece of KV, and keeps float32 [H, tile, D]
    and one number a query of each. Eager plans cut KV only while all items run at once; captured
    ones always reserve room for it, at the tile of one token a row.
    """
    group = num_heads // num_kv_heads
    at_once = _CTAS_PER_SM * num_sms // num_kv_heads
    tile = 16 if group <= 16 else 64 if group <= 64 else _LARGEST_TILE
    items = max(at_once, -(-max_rows * group // tile) + max_rows - 1)
    queries = max(items * tile, at_once * _LARGEST_TILE)
    alignment = 64
    return num_heads * queries * (head_dim + 1) * _FLOAT_BYTES + alignment


class FlashInferBackend:
    """Back end over FlashInfer's wrappers; float16 and bfloat16 on a GPU.

    A step that `prepare` returned is valid until the next one is prepared. The kernels are
    compiled when first needed, which takes one to two minutes without FlashInfer's cache. Raises
    ImportError when the package is not installed.
    """

    name = "flashinfer"

    def __init__(
        self,
        pool: KVPool,
        *,
        num_heads: int,
        scale: float,
        long_kernels: str = "auto",
        long_queries: int = LONG_QUERIES,
    ) -> None:
        """long_kernels: "fa2", "fa3", or "auto" for what FlashInfer takes on this GPU, in steps
        of at least `long_queries` queries a row on average; shorter ones take FA2."""
        import flashinfer

        self._library = flashinfer
        self._pool = pool
        self._heads = common_heads(pool.layouts)
        self._num_heads = num_heads
        self._scale = scale
        self._long_kernels = long_kernels
        self._long_queries = long_queries
        self._workspace: torch.Tensor | None = None
        self._decode_ints: torch.Tensor | None = None
        self._prefill: dict[str, _Prefill] = {}

    def prepare(self, batch: AttentionBatch) -> FlashInferStep:
        """Plan a step of any rows; one host-to-device copy per table, none of them waited for."""
        num_rows = len(batch.slots_R)
        long = int(batch.query_start_R1[-1]) >= self._long_queries * num_rows
        prefill = self._prefill_of(self._long_kernels if long else "fa2", len(batch.page_table))
        prefill.plan(batch)
        return self._step(prefill.wrapper, batch.write_slots_T)

    def capture_decode(self, layout: DecodeLayout) -> FlashInferDecode:
        """The step of one graph; its `refresh` plans."""
        max_rows = len(layout.page_table)
        if self._decode_ints is None:
            # Replays never overlap, and each is planned for just before it.
            self._decode_ints = torch.empty(
                _DECODE_INT_BYTES, dtype=torch.uint8, device=self._device
            )
        most = layout.rows * layout.page_table.shape[1]
        tables = torch.zeros(2 * layout.rows + 1 + most, dtype=torch.int32, device=self._device)
        indptr, last, indices = tables.split([layout.rows + 1, layout.rows, most])
        wrapper = self._library.BatchDecodeWithPagedKVCacheWrapper(
            self._floats(max_rows),
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=indptr,
            paged_kv_indices_buffer=indices,
            paged_kv_last_page_len_buffer=last,
            backend="fa2",
        )
        wrapper.reset_workspace_buffer(self._floats(max_rows), self._decode_ints)
        return FlashInferDecode(
            step=self._step(wrapper, layout.write_slots_R),
            fast_plan=self._library.fast_decode_plan,
            tables=tables,
            layout=layout,
            options=self._decode_options(),
        )

    @property
    def _device(self) -> torch.device:
        return self._pool.device

    def _step(self, wrapper: Any, write_slots_T: torch.Tensor) -> FlashInferStep:
        return FlashInferStep(PoolWrites(self._pool, write_slots_T), self._pool, wrapper)

    def _floats(self, max_rows: int) -> torch.Tensor:
        """Where partial results go: of all wrappers the same, since they run in turn."""
        if self._workspace is None:
            size = workspace_bytes(
                num_heads=self._num_heads,
                num_kv_heads=self._heads.num_kv_heads,
                head_dim=self._heads.key_dim,
                max_rows=max_rows,
                num_sms=torch.cuda.get_device_properties(self._device).multi_processor_count,
            )
            self._workspace = torch.zeros(size, dtype=torch.uint8, device=self._device)
        return self._workspace

    def _prefill_of(self, kernels: str, max_rows: int) -> _Prefill:
        if kernels not in self._prefill:
            wrapper = self._library.BatchPrefillWithPagedKVCacheWrapper(
                self._floats(max_rows), backend=kernels
            )
            options = self._shape() | {"head_dim_qk": self._heads.key_dim, "causal": True}
            self._prefill[kernels] = _Prefill(wrapper, options)
        return self._prefill[kernels]

    def _decode_options(self) -> dict[str, Any]:
        return self._shape() | {"head_dim": self._heads.key_dim}

    def _shape(self) -> dict[str, Any]:
        dtype = self._heads.dtype
        return {
            "num_qo_heads": self._num_heads,
            "num_kv_heads": self._heads.num_kv_heads,
            "page_size": self._pool.page_size,
            "q_data_type": dtype,
            "kv_data_type": dtype,
            "sm_scale": self._scale,
        }


@dataclass(frozen=True)
class FlashInferStep:
    """One prepared step; runs by its wrapper's latest plan."""

    writes: PoolWrites
    pool: KVPool
    wrapper: Any

    def attend(self, layer_index: int, q_THD: torch.Tensor) -> torch.Tensor:
        """See `AttentionStep`."""
        k_NGKD, v_NGKD = self.pool.layer(layer_index)
        # Else the wrapper clears the memory of its output first.
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        self.wrapper.run(q_THD, (k_NGKD, v_NGKD), out=out_THD)
        return out_THD


class _Prefill:
    """An eager wrapper and the guard of its pinned memory.

    `plan` writes the work layout into a pinned buffer of the wrapper and queues its copy to the
    device. With steps queued ahead, that copy may still wait when the next plan is made.
    """

    def __init__(self, wrapper: Any, options: dict[str, Any]) -> None:
        self.wrapper = wrapper
        self._options = options
        self._copied = torch.cuda.Event()

    def plan(self, batch: AttentionBatch) -> None:
        rows = paged_rows(batch.host_pages, batch.slots_R, batch.kv_lens_R, batch.page_size)
        num_rows = len(batch.slots_R)
        parts = [batch.query_start_R1, rows.indptr_R1, rows.last_R, batch.kv_lens_R]
        packed = np.concatenate([*parts, rows.indices_U]).astype(np.int32)
        # Pinned, or every copy that `plan` makes of these would wait for the GPU.
        pinned = torch.from_numpy(packed).pin_memory()
        starts, indptr, last, kv_lens, indices = pinned.split(
            [num_rows + 1, num_rows + 1, num_rows, num_rows, len(rows.indices_U)]
        )
        self._copied.synchronize()
        self.wrapper.plan(
            starts,
            indptr,
            indices,
            last,
            seq_lens=kv_lens,
            max_token_per_sequence=int(batch.query_lens_R.max()),
            **self._options,
        )
        self._copied.record()


class FlashInferDecode:
    """Attention of one CUDA graph: `engine.attention.base.CapturedDecode`."""

    def __init__(
        self,
        *,
        step: FlashInferStep,
        fast_plan: Any,
        tables: torch.Tensor,
        layout: DecodeLayout,
        options: dict[str, Any],
    ) -> None:
        self.step: AttentionStep = step
        self._wrapper = step.wrapper
        self._fast_plan = fast_plan
        self._tables = tables
        self._layout = layout
        self._options = options
        self._copied = torch.cuda.Event()
        self._plan_of_capture: list[int] | None = None

    def refresh(self, slots: np.ndarray, kv_lens: np.ndarray, *, exact: bool = True) -> None:
        """Bring the rows' pages to the device and plan for them; nothing is waited for unless
        two plans are queued ahead."""
        assert exact, "flashinfer plans on the host, for lengths that are known there"
        layout = self._layout
        rows = paged_rows(layout.host_pages, slots, kv_lens, layout.page_size)
        packed = np.concatenate([rows.indptr_R1, rows.last_R, rows.indices_U])
        self._tables[: len(packed)].copy_(to_device(packed, self._tables.device))
        self._copied.synchronize()
        host = [torch.from_numpy(part) for part in (rows.indptr_R1, rows.indices_U, rows.last_R)]
        wrapper = self._wrapper
        if self._plan_of_capture is None:
            wrapper.plan(*host, **self._options)
            self._plan_of_capture = list(wrapper._plan_info)
        else:
            self._fast_plan(wrapper, *host, **self._options)
            # What a launch was captured with does not change: tiles, grid, offsets.
            assert list(wrapper._plan_info) == self._plan_of_capture, "a plan left its graph"
        self._copied.record()
