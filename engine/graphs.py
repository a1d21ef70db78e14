"""Decode steps as CUDA-graph replays: one launch from the host in place of some hundreds.

Legend: R rows of a bucket, V vocabulary.

A graph is captured when a step first needs it: for a bucket of rows and what attention depends
on, such as rows that share pages. It serves every KV length. It reads slots and KV lengths from
one static buffer and everything else (token ids, pages, sampling parameters) from the device
tables, so that a replay needs no other input. All graphs allocate from one memory pool: they
never run at the same time. Weights change in place, so graphs survive updates.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from engine.attention.base import (
    AttentionStep,
    CapturableBackend,
    CapturedDecode,
    DecodeLayout,
)
from engine.attention.stored import ForwardContext
from engine.batch import RequestTable
from engine.models.build import Model
from engine.sampling import PLAIN, DrawOptions, Sampler
from engine.transfer import to_device

logger = logging.getLogger(__name__)

_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896)


def row_buckets(max_rows: int) -> list[int]:
    """Batch sizes that graphs are captured for, ascending; the last is `max_rows`.

    Above 1024 rows they grow by 256: what padding costs there is below a seventh.
    """
    sizes = [*_BUCKETS, *range(1024, max_rows, 256)]
    return [size for size in sizes if size < max_rows] + [max_rows]


@dataclass(frozen=True)
class _Captured:
    """A graph and the attention that it holds."""

    graph: torch.cuda.CUDAGraph
    step: AttentionStep


class DecodeGraphs:
    """Captures and replays the decode step of plain rows.

    scratch_slot: a row of the tables that no request takes; its pages are of nobody. Rows
    that pad a bucket run on it. region: what a capture allocates belongs to it.
    """

    def __init__(
        self,
        model: Model,
        table: RequestTable,
        sampler: Sampler,
        attention: CapturableBackend,
        *,
        max_rows: int,
        scratch_slot: int,
        region: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._model = model
        self._table = table
        self._sampler = sampler
        self._attention = attention
        self._buckets = np.array(row_buckets(max_rows))
        self._scratch_slot = scratch_slot
        self._region = region
        self._device = table.device
        self._inputs = torch.zeros(2 * max_rows, dtype=torch.int32, device=table.device)
        self._write_slots = torch.zeros(max_rows, dtype=torch.int64, device=table.device)
        self._outputs = torch.zeros(3 * max_rows, dtype=torch.int32, device=table.device)
        self._query_start = torch.arange(max_rows + 1, dtype=torch.int32, device=table.device)
        self._attentions: dict[int, CapturedDecode] = {}
        self._graphs: dict[tuple[int, DrawOptions], _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(table.device)

    def run(
        self, slots: np.ndarray, kv_lens: np.ndarray, options: DrawOptions = PLAIN
    ) -> torch.Tensor:
        """Queue one decode step over `slots`; `kv_lens` as in `StepPlan`.

        options: what the rows' draws need; see `Sampler.options`. Returns int32 [2 or 3, R] as
        `engine.pending.pack_sampled` lays it out, R the bucket. The next call overwrites it.
        """
        rows = int(self._buckets[np.searchsorted(self._buckets, len(slots))])
        attention = self._attentions.get(rows)
        if attention is None:
            attention = self._attention.capture_decode(self._layout(rows))
            self._attentions[rows] = attention
        attention.refresh(*self._fill(rows, slots, kv_lens))
        key = id(attention.step), options
        captured = self._graphs.get(key)
        if captured is None:
            captured = self._graphs[key] = self._capture(rows, attention.step, options)
            self._fill(rows, slots, kv_lens)
        captured.graph.replay()
        num_outputs = 3 if options.entropy else 2
        return self._outputs[: num_outputs * rows].view(num_outputs, rows)

    def capture_all(self) -> None:
        """Capture every bucket, on rows that no request has.

        Variants that only some steps ask for (shared prompts, filters, entropy) stay lazy.
        """
        for rows in self._buckets.tolist():
            slots = np.full(rows, self._scratch_slot, dtype=np.int32)
            self.run(slots, np.ones(rows, dtype=np.int32))

    def _fill(self, rows: int, slots: np.ndarray, kv_lens: np.ndarray) -> np.ndarray:
        """Send the rows of the next replay, padded to the bucket: int32 [2, R]."""
        packed = np.empty((2, rows), dtype=np.int32)
        packed[0, : len(slots)], packed[0, len(slots) :] = slots, self._scratch_slot
        packed[1, : len(slots)], packed[1, len(slots) :] = kv_lens, 1
        self._inputs[: 2 * rows].copy_(to_device(packed.reshape(-1), self._device))
        return packed

    def _capture(self, rows: int, step: AttentionStep, options: DrawOptions) -> _Captured:
        """Record a step; what it runs over meanwhile are rows of nobody."""
        started = time.perf_counter()
        nobody = np.zeros(0, dtype=np.int32)
        self._fill(rows, nobody, nobody)
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with self._region(), torch.cuda.stream(self._stream):
            # Kernels are compiled and loaded by a plain run: a capture allows neither.
            self._forward(rows, step, options)
            self._stream.synchronize()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                self._forward(rows, step, options)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        logger.info("captured %d rows in %.2f s", rows, time.perf_counter() - started)
        return _Captured(graph, step)

    def _layout(self, rows: int) -> DecodeLayout:
        return DecodeLayout(
            rows=rows,
            slots_R=self._inputs[:rows],
            kv_lens_R=self._inputs[rows : 2 * rows],
            write_slots_R=self._write_slots[:rows],
            query_start_R1=self._query_start[: rows + 1],
            page_table=self._table.page_table,
            host_pages=self._table.host_pages,
            max_kv_len=self._table.token_ids.shape[1],
            page_size=self._table.page_size,
        )

    def _forward(self, rows: int, step: AttentionStep, options: DrawOptions) -> None:
        table, page_size = self._table, self._table.page_size
        slots_R, at_R = self._inputs[: 2 * rows].long().view(2, rows)
        positions_R = at_R - 1
        pages_R = table.page_table[slots_R, positions_R // page_size].long()
        first_R, offset_R = pages_R * page_size, positions_R % page_size
        torch.add(first_R, offset_R, out=self._write_slots[:rows])
        context = ForwardContext(positions_R, step)
        hidden_RE = self._model(table.token_ids[slots_R, positions_R], context)
        logits_RV = self._model.compute_logits(hidden_RE, widen=False)
        outputs_3R = self._outputs[: 3 * rows].view(3, rows)
        entropy_R = outputs_3R[2].view(torch.float32) if options.entropy else None
        tokens_R, logprobs_R = self._sampler.draw_plain(
            logits_RV, slots_R, at_R, options, entropy_R
        )
        table.append(slots_R, at_R, tokens_R)
        outputs_3R[0].copy_(tokens_R)
        outputs_3R[1].view(torch.float32).copy_(logprobs_R)
