"""Decode steps as CUDA-graph replays: one launch from the host in place of some hundreds.

Legend: R rows of a bucket, K drafts of a row, J = K + 1, V = R * J rows of the model's step.

A graph is captured when a step first needs it: for a bucket of rows, the drafts each of them
verifies, and what attention depends on, such as rows that share pages. It drafts, lays the rows
out, runs the model, draws and accepts. It reads slots and draft lengths from one static buffer and
everything else (lengths, token ids, pages, sampling parameters) from the device tables, so that a
replay needs no other input and serves every KV length. All graphs allocate from one memory pool:
they never run at the same time. Weights change in place, so graphs survive updates.

A step that waits for masks is drawn apart from its forward pass: its graph drafts nothing and ends
with the logits, which are drawn from kernel by kernel (`engine.late_draw`).
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
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
from engine.attention.context import ForwardContext
from engine.batch import RequestTable
from engine.config import DRAFT_LADDER, ROW_BUCKETS
from engine.kv.route_pool import RoutePool
from engine.late_draw import DecodeLogits
from engine.models.build import Model
from engine.sampling import PLAIN, DrawOptions, Sampler
from engine.speculative.ngram import NgramDrafter
from engine.transfer import to_device
from kernels.speculative.accept import accept
from kernels.speculative.rows import VirtualRows, virtual_rows

logger = logging.getLogger(__name__)

_MOST_LOGIT_BYTES = 256 << 20
"""Of the buffer for the logits of steps that are drawn later, if they were float32. What memory is
planned by (`engine.memory.graph_bytes`) has room for it, since logits are of 16 bits."""


def row_buckets(max_rows: int) -> list[int]:
    """Batch sizes that graphs are captured for, ascending; the last is `max_rows`.

    Above 1024 rows they grow by 256: what padding costs there is below a seventh.
    """
    sizes = [*ROW_BUCKETS, *range(1024, max_rows, 256)]
    return [size for size in sizes if size < max_rows] + [max_rows]


def num_kinds(max_rows: int, max_verified: int, draft_tokens: int) -> int:
    """Graphs that plain draws ask for: one for each bucket and number of drafts that it has room
    for. What memory is planned by; arguments as of `DecodeGraphs`, and most drafts of a row."""
    ladder = DRAFT_LADDER[: bisect_left(DRAFT_LADDER, draft_tokens) + 1] if draft_tokens else ()
    buckets = row_buckets(max_rows)
    return sum(rows * (k + 1) <= max_verified for rows in buckets for k in (0, *ladder))


@dataclass(frozen=True)
class _Captured:
    """A graph and the attention that it holds."""

    graph: torch.cuda.CUDAGraph
    step: AttentionStep


@dataclass(frozen=True)
class _Kind:
    """What a graph is captured for: rows, drafts of each, and what their draws need; None where
    it ends with the logits."""

    rows: int
    drafts: int
    options: DrawOptions | None

    @property
    def verified(self) -> int:
        """Rows of the model's step."""
        return self.rows * (self.drafts + 1)


@dataclass(frozen=True)
class GraphOutputs:
    """What a replay drew, in static buffers that the next one overwrites: `sampled` int32
    [2 or 3, V] as `engine.pending.pack_sampled` lays it out; counts int32 [2, R], tokens of each
    row that count and drafts there were; row r's tokens begin at r * `width`."""

    sampled: torch.Tensor
    counts: torch.Tensor
    width: int


class DecodeGraphs:
    """Captures and replays the decode step of plain rows.

    max_rows: rows of a step; max_verified: rows of the model's step, drafts among them.
    scratch_slot: a row of the tables that no request takes; its pages are of nobody. Rows
    that pad a bucket run on it. drafter: None where nothing is drafted. routes: where those of the
    rows belong, if they are kept. region: what a capture allocates belongs to it.
    """

    def __init__(
        self,
        model: Model,
        table: RequestTable,
        sampler: Sampler,
        attention: CapturableBackend,
        *,
        max_rows: int,
        max_verified: int,
        scratch_slot: int,
        drafter: NgramDrafter | None = None,
        routes: RoutePool | None = None,
        region: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._model = model
        self._table = table
        self._sampler = sampler
        self._attention = attention
        self._buckets = np.array(row_buckets(max_rows))
        self._scratch_slot = scratch_slot
        self._region = region
        self._routes = routes
        self._device = table.device
        self._drafter = drafter
        self._max_verified = max_verified
        self._inputs = torch.zeros(2 * max_rows + 1, dtype=torch.int32, device=table.device)
        self._rows = VirtualRows.empty(max_verified, table.device)
        self._drafts = torch.zeros(max_verified, dtype=torch.int32, device=table.device)
        self._counts = torch.zeros(2 * max_rows, dtype=torch.int32, device=table.device)
        self._outputs = torch.zeros(3 * max_verified, dtype=torch.int32, device=table.device)
        self._query_start = torch.arange(max_verified + 1, dtype=torch.int32, device=table.device)
        self._logits: torch.Tensor | None = None
        self._attentions: dict[tuple[int, int], CapturedDecode] = {}
        self._graphs: dict[tuple[int, _Kind], _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(table.device)

    def run(
        self,
        slots: np.ndarray,
        kv_lens: np.ndarray,
        options: DrawOptions = PLAIN,
        draft_lens: np.ndarray | None = None,
    ) -> GraphOutputs:
        """Queue one decode step over `slots`.

        kv_lens, draft_lens: int32 [R] as in `StepPlan`; without drafts the lengths are those that
        the device knows. options: what the rows' draws need; see `Sampler.options`.
        """
        rows = self._bucket(len(slots))
        kind = _Kind(rows, self._most_drafts(rows, draft_lens), options)
        self._replay(kind, slots, kv_lens, draft_lens)
        num_outputs = 3 if options.entropy else 2
        return GraphOutputs(
            sampled=self._outputs[: num_outputs * kind.verified].view(num_outputs, -1),
            counts=self._counts[: 2 * rows].view(2, rows),
            width=kind.drafts + 1,
        )

    def keeps_logits(self, num_rows: int) -> bool:
        """Whether `forward` serves so many rows. With more of them the launches of a step, which a
        graph saves, are a small part of it."""
        num_bytes = self._bucket(num_rows) * self._model.config.vocab_size * 4
        return num_bytes <= _MOST_LOGIT_BYTES

    def forward(
        self, slots: np.ndarray, kv_lens: np.ndarray, draft_lens: np.ndarray | None = None
    ) -> DecodeLogits:
        """Queue the forward pass of one decode step that drafts nothing; arguments as of `run`."""
        rows = self._bucket(len(slots))
        self._replay(_Kind(rows, 0, None), slots, kv_lens, draft_lens)
        assert self._logits is not None
        num_rows = len(slots)
        return DecodeLogits(
            logits_SV=self._logits[:num_rows],
            slots_S=self._rows.slots_V[:num_rows].long(),
            kv_lens_S=self._rows.positions_V[:num_rows] + 1,
        )

    def _bucket(self, num_rows: int) -> int:
        return int(self._buckets[np.searchsorted(self._buckets, num_rows)])

    def _replay(
        self,
        kind: _Kind,
        slots: np.ndarray,
        kv_lens: np.ndarray,
        draft_lens: np.ndarray | None,
    ) -> None:
        rows, shape = kind.rows, (kind.rows, kind.drafts)
        attention = self._attentions.get(shape)
        if attention is None:
            attention = self._attention.capture_decode(self._layout(kind))
            self._attentions[shape] = attention
        packed = self._fill(kind, slots, draft_lens)
        lens = np.ones(rows, dtype=np.int32)
        lens[: len(kv_lens)] = kv_lens
        attention.refresh(packed[0], lens, exact=draft_lens is None)
        key = id(attention.step), kind
        captured = self._graphs.get(key)
        if captured is None:
            captured = self._graphs[key] = self._capture(kind, attention.step)
            self._fill(kind, slots, draft_lens)
        captured.graph.replay()

    def capture_all(self) -> None:
        """Capture every bucket, on rows that no request has.

        Variants that only some steps ask for (drafts, shared prompts, filters, entropy) stay lazy.
        """
        for rows in self._buckets.tolist():
            slots = np.full(rows, self._scratch_slot, dtype=np.int32)
            self.run(slots, np.ones(rows, dtype=np.int32))

    def _most_drafts(self, rows: int, draft_lens: np.ndarray | None) -> int:
        """Drafts of each row of a graph that serves these; fewer where the buffers end."""
        if draft_lens is None or self._drafter is None:
            return 0
        wanted, room = int(draft_lens.max(initial=0)), self._max_verified // rows - 1
        # Few kinds of graph: rows near their end, which want fewer, ask for none of their own.
        fits = [k for k in (0, *DRAFT_LADDER) if k <= room]
        return next((k for k in fits if k >= wanted), fits[-1])

    def _fill(
        self, kind: _Kind, slots: np.ndarray, draft_lens: np.ndarray | None = None
    ) -> np.ndarray:
        """Send the rows of the next replay, padded to the bucket, and how many of the model's step
        they are; returns the former: int32 [2, R]."""
        rows = kind.rows
        inputs = np.zeros(2 * rows + 1, dtype=np.int32)
        packed, inputs[-1] = inputs[:-1].reshape(2, rows), len(slots) * (kind.drafts + 1)
        packed[0, : len(slots)], packed[0, len(slots) :] = slots, self._scratch_slot
        if draft_lens is not None:
            packed[1, : len(slots)] = draft_lens
        self._inputs[: 2 * rows + 1].copy_(to_device(inputs, self._device))
        return packed

    def _capture(self, kind: _Kind, step: AttentionStep) -> _Captured:
        """Record a step; what it runs over meanwhile are rows of nobody."""
        started = time.perf_counter()
        self._fill(kind, np.zeros(0, dtype=np.int32))
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with self._region(), torch.cuda.stream(self._stream):
            # Kernels are compiled and loaded by a plain run: a capture allows neither.
            self._forward(kind, step)
            self._stream.synchronize()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                self._forward(kind, step)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        seconds = time.perf_counter() - started
        logger.info("captured %d rows, %d drafts in %.2f s", kind.rows, kind.drafts, seconds)
        return _Captured(graph, step)

    def _layout(self, kind: _Kind) -> DecodeLayout:
        verified = kind.verified
        return DecodeLayout(
            rows=verified,
            slots_R=self._rows.slots_V[:verified],
            kv_lens_R=self._rows.kv_lens_V[:verified],
            write_slots_R=self._rows.write_slots_V[:verified],
            query_start_R1=self._query_start[: verified + 1],
            page_table=self._table.page_table,
            host_pages=self._table.host_pages,
            max_kv_len=self._table.token_ids.shape[1],
            page_size=self._table.page_size,
            run=kind.drafts + 1,
        )

    def _forward(self, kind: _Kind, step: AttentionStep) -> None:
        table, verified = self._table, kind.verified
        slots_R, lens_R = self._inputs[: 2 * kind.rows].view(2, kind.rows)
        drafts_RK = self._drafts[: kind.rows * kind.drafts].view(kind.rows, kind.drafts)
        counts_R, drafted_R = self._counts[: 2 * kind.rows].view(2, kind.rows)
        if kind.drafts and self._drafter is not None:
            self._drafter.propose(slots_R, lens_R, drafts_RK, drafted_R)
        rows = virtual_rows(
            slots_R,
            drafts_RK,
            drafted_R,
            length=table.length,
            limit=table.limit,
            token_ids=table.token_ids,
            page_table=table.page_table,
            page_size=table.page_size,
            scratch_slot=self._scratch_slot,
            out=self._rows.first(verified),
            backend="triton",
        )
        # Unused drafts of rows that are there count as rows; what fills the bucket does not.
        num_rows = self._inputs[2 * kind.rows : 2 * kind.rows + 1]
        routes = None if self._routes is None else self._routes.step(rows.write_slots_V)
        context = ForwardContext(rows.positions_V, step, num_rows=num_rows, routes=routes)
        hidden_VE = self._model(rows.input_ids_V, context)
        logits = self._model.compute_logits(hidden_VE, widen=False)
        if kind.options is None:
            self._keep(logits)
            return
        outputs_3V = self._outputs[: 3 * verified].view(3, verified)
        entropy_V = outputs_3V[2].view(torch.float32) if kind.options.entropy else None
        slots_V, at_V = rows.slots_V.long(), rows.positions_V + 1
        tokens_V, logprobs_V = self._sampler.draw_plain(
            logits, slots_V, at_V, kind.options, entropy_V
        )
        accept(
            tokens_V,
            slots_R,
            drafts_RK,
            drafted_R,
            length=table.length,
            limit=table.limit,
            forced=table.forced,
            token_ids=table.token_ids,
            counts_R=counts_R,
            backend="triton",
        )
        outputs_3V[0].copy_(tokens_V)
        outputs_3V[1].view(torch.float32).copy_(logprobs_V)

    def _keep(self, logits_RV: torch.Tensor) -> None:
        """Copy logits to the buffer, which is made by the plain run before the first capture."""
        num_rows, vocab_size = logits_RV.shape
        if self._logits is None:
            most = max(row for row in self._buckets.tolist() if self.keeps_logits(row))
            self._logits = logits_RV.new_empty((most, vocab_size))
        self._logits[:num_rows].copy_(logits_RV)
