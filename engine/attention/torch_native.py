"""Attention in plain torch: what a CPU runs, and the reference on a GPU.

Legend: T tokens, R rows, B rows of one bucket, Q padded queries of a row, H query heads,
K kv heads, M = H // K query heads of one kv head, D head dim, L padded KV length, G page size.

Every query attends to up to a few disjoint runs of KV: the pages its row shares with its
neighbours (one dense product for all of them, `engine.attention.sharing`) and the pages of
its own. Partial results are merged by their log-sum-exp, as in FlashAttention's split-KV
(Dao et al., arXiv 2205.14135, and "Flash-Decoding"). Layers with a sliding window share nothing,
and gather only the pages that their window reaches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from engine.attention.base import AttentionBatch, NewHeads
from engine.attention.context import PoolWrites
from engine.attention.sharing import Segment, find_shared_prefixes
from engine.kv.layout import HeadPages, common_heads, head_pages
from engine.kv.pool import KVPool
from kernels.kv_copy import write_kv
from kernels.quant.fp8_kv import as_bytes, decode
from kernels.torch_compat import flash_attention_cpu

# Rows are padded together while the longest is at most this many times the shortest.
MAX_PADDING = 2


@dataclass(frozen=True)
class Bucket:
    """Rows whose own KV is attended in one padded call.

    token_BQ: int64 [B, Q], tokens of each row (padding repeats its last token).
    pages: int64 [B * P] own pages, padding repeats page 0 of the pool. bias_B1NL: additive
    mask, 0 or -inf, in the query dtype, for the N = Q * M queries of one kv head. flat: the
    rows' tokens are one unpadded run [start, stop), so queries and outputs are views.
    """

    token_BQ: torch.Tensor
    valid_BQ: torch.Tensor
    pages: torch.Tensor
    bias_B1NL: torch.Tensor
    flat: tuple[int, int] | None


@dataclass(frozen=True)
class SharedRun:
    """Tokens [start, stop) of the step all attend to every position of `pages`.

    pages: int64 [P], or the slice of the pool they are when their ids are consecutive.
    """

    start: int
    stop: int
    pages: torch.Tensor | slice


@dataclass(frozen=True)
class Layout:
    """How the rows of a step are attended, equal for all layers of one window.

    order_T: see `_token_order`.
    """

    buckets: list[Bucket]
    order_T: torch.Tensor | None
    runs: list[SharedRun]


class TorchNativeBackend:
    """Back end over scaled dot products of torch; any device and dtype."""

    name = "torch_native"

    def __init__(
        self,
        pool: KVPool,
        *,
        num_heads: int,
        scale: float,
        share_prefixes: bool = True,
    ) -> None:
        heads = common_heads(pool.layouts)
        self._pool = pool
        self._dtype = heads.dtype
        self._group = num_heads // heads.num_kv_heads
        self._scale = scale
        self._share = share_prefixes

    def prepare(self, batch: AttentionBatch) -> TorchNativeStep:
        """Find shared runs and pad the rest into few buckets, once for each window."""
        pages_RP = batch.host_pages[batch.slots_R]
        if self._pool.spoilt.any:
            places_T = batch.write_slots_T.cpu().numpy()
            self._pool.spoilt.written(*np.divmod(places_T, batch.page_size))
        windows = {layout.window for layout in self._pool.layouts}
        return TorchNativeStep(
            writes=FiniteWrites(PoolWrites(self._pool, batch.write_slots_T)),
            pool=self._pool,
            scale=self._scale,
            batch=batch,
            pages_RP=pages_RP,
            layouts={window: self._layout(batch, pages_RP, window) for window in windows},
        )

    def _layout(self, batch: AttentionBatch, pages_RP: np.ndarray, window: int | None) -> Layout:
        own_start_R = np.zeros(len(batch.slots_R), dtype=np.int64)
        segments: list[Segment] = []
        computed = batch.kv_lens_R - batch.query_lens_R
        if window is not None:
            own_start_R = np.maximum(computed - (window - 1), 0) // batch.page_size
        elif self._share:
            found = find_shared_prefixes(pages_RP, computed, batch.page_size)
            segments, own_start_R = found.segments, found.own_start_R
        buckets = [
            _bucket(batch, pages_RP, own_start_R, rows, self._dtype, self._group, window)
            for rows in _group_rows(batch)
        ]
        return Layout(
            buckets=buckets,
            order_T=_token_order(buckets),
            runs=[_shared_run(batch, pages_RP, segment) for segment in segments],
        )


@dataclass(frozen=True)
class FiniteWrites:
    """`KVWrites` that puts zeros in place of what is not finite, and marks where.

    Pages outlive the request that filled them, and the next one reads their tails under a mask:
    one request gone to NaN, or one bad update, must not reach others. Whoever reads these zeros as
    its own prefix is known by `KVPool.spoilt` and ends with NonFiniteLogits.
    """

    writes: PoolWrites

    def store(self, layer_index: int, heads: NewHeads) -> torch.Tensor:
        """See `KVWrites`."""
        q_THD, k_TKD, v_TKD = heads.rotated()
        target = self.writes.target(layer_index)
        if not _is_finite(k_TKD, v_TKD):
            wrong_T = ~(k_TKD.isfinite() & v_TKD.isfinite()).flatten(1).all(1)
            pool = self.writes.pool
            pool.spoilt.mark(*np.divmod(target.slots_T[wrong_T].cpu().numpy(), pool.page_size))
            k_TKD, v_TKD = _zeroed(k_TKD), _zeroed(v_TKD)
        pages = (target.k_pages_NGKD, target.v_pages_NGKD)
        write_kv(k_TKD, v_TKD, *pages, target.slots_T, scales=target.scales, backend="torch")
        return q_THD


@dataclass(frozen=True)
class TorchNativeStep:
    """One prepared step. pages_RP: int32, the page table of its rows on the host.

    layouts: how rows are attended, by window.
    """

    writes: FiniteWrites
    pool: KVPool
    scale: float
    batch: AttentionBatch
    pages_RP: np.ndarray
    layouts: Mapping[int | None, Layout]

    def layout(self, layer_index: int) -> Layout:
        """That of one layer."""
        return self.layouts[self.pool.layouts[layer_index].window]

    def attend(self, layer_index: int, q_THD: torch.Tensor) -> torch.Tensor:
        """See `AttentionStep`."""
        pages = head_pages(self.pool.layer(layer_index))
        layout = self.layout(layer_index)
        partial = [self._own(bucket, q_THD, pages) for bucket in layout.buckets]
        out_THD, lse_TH = partial[0]
        if layout.order_T is not None:
            out_THD = torch.cat([out for out, _ in partial])[layout.order_T]
            lse_TH = torch.cat([lse for _, lse in partial])[layout.order_T]
        for index, run in enumerate(layout.runs):
            rows = slice(run.start, run.stop)
            out, lse = self._shared(run, q_THD[rows], pages)
            last = index + 1 == len(layout.runs)
            _merge_into(out_THD[rows], lse_TH[rows], out, lse, need_lse=not last)
        return out_THD

    def spoilt_rows(self) -> np.ndarray:
        """Rows that attended to zeros in place of KV that was not finite, bool [R]; to be asked
        after the last layer."""
        batch = self.batch
        return self.pool.spoilt.rows(self.pages_RP, batch.kv_lens_R, batch.page_size)

    def _own(
        self, bucket: Bucket, q_THD: torch.Tensor, pages: HeadPages
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A bucket's rows over their own pages: ([B * Q, H, D], float32 [B * Q, H])."""
        size, queries = bucket.token_BQ.shape
        k_BKLD, v_BKLD = _gather(pages, bucket.pages, size, q_THD.dtype)
        if bucket.flat is not None:
            start, stop = bucket.flat
            q_BQHD = q_THD[start:stop].view(size, queries, *q_THD.shape[1:])
        else:
            q_BQHD = q_THD[bucket.token_BQ]
        return _attend(q_BQHD, k_BKLD, v_BKLD, bucket.bias_B1NL, self.scale)

    def _shared(
        self, run: SharedRun, q_THD: torch.Tensor, pages: HeadPages
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Some tokens over pages that all of them read: ([T, H, D], float32 [T, H])."""
        k_BKLD, v_BKLD = _gather(pages, run.pages, 1, q_THD.dtype)
        return _attend(q_THD.unsqueeze(0), k_BKLD, v_BKLD, None, self.scale)


def _token_order(buckets: list[Bucket]) -> torch.Tensor | None:
    """Where each token of the step is among the padded rows of all buckets; None where they
    are the tokens in order already. int64 [T]."""
    if len(buckets) == 1 and buckets[0].flat is not None:
        return None
    tokens = torch.cat([bucket.token_BQ.flatten() for bucket in buckets])
    valid = torch.cat([bucket.valid_BQ.flatten() for bucket in buckets])
    places = valid.nonzero().squeeze(1)
    return places[tokens[places].argsort()]


def _merge_into(
    out_THD: torch.Tensor,
    lse_TH: torch.Tensor,
    other_THD: torch.Tensor,
    other_lse_TH: torch.Tensor,
    *,
    need_lse: bool,
) -> None:
    """Merge another partial result into `out` and, if needed again, `lse`; in place."""
    share_TH1 = torch.sigmoid(other_lse_TH - lse_TH).unsqueeze(-1)
    merged = torch.lerp(out_THD.float(), other_THD.float(), share_TH1)
    out_THD.copy_(merged)
    if need_lse:
        torch.logaddexp(lse_TH, other_lse_TH, out=lse_TH)


def _attend(
    q_BQHD: torch.Tensor,
    k_BKLD: torch.Tensor,
    v_BKLD: torch.Tensor,
    bias_B1NL: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention with its log-sum-exp. Returns ([B * Q, H, D], float32 [B * Q, H]).

    The query heads of one kv head are stacked as further queries of it, so K and V are never
    repeated in memory.
    """
    size, queries, num_heads, head_dim = q_BQHD.shape
    kv_heads = k_BKLD.shape[1]
    group = num_heads // kv_heads
    q = q_BQHD.view(size, queries, kv_heads, group, head_dim).transpose(1, 2)
    q = q.reshape(size, kv_heads, queries * group, head_dim)
    out, lse = _dense(q, k_BKLD, v_BKLD, bias_B1NL, scale)
    out = out.view(size, kv_heads, queries, group, head_dim).transpose(1, 2)
    lse = lse.view(size, kv_heads, queries, group).transpose(1, 2)
    tokens = size * queries
    return out.reshape(tokens, num_heads, head_dim), lse.reshape(tokens, num_heads)


def _dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if q.device.type == "cpu":
        return flash_attention_cpu(q, k, v, bias, scale)
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * scale
    if bias is not None:
        scores = scores + bias.float()
    return torch.matmul(scores.softmax(-1), v.float()).to(q.dtype), scores.logsumexp(-1)


def _is_finite(k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> bool:
    """Whether all values are finite, or their sums happen to be infinite: one pass over each,
    where an exact look would take several."""
    sums = [float(values.sum(dtype=torch.float32)) for values in (k_TKD, v_TKD)]
    return math.isfinite(sum(sums))


def _zeroed(values: torch.Tensor) -> torch.Tensor:
    """NaN and infinities as zero."""
    return torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)


def _gather(
    pages: HeadPages, ids: torch.Tensor | slice, size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B * P] page ids, or a slice of the pool -> keys and values in them, [B, K, L, D] each, in
    `dtype`."""
    scales = pages.scales or (None, None)
    k_PGKD = _taken(pages.k_NGKD, scales[0], ids, dtype)
    v_PGKD = _taken(pages.v_NGKD, scales[1], ids, dtype)
    k_BKLD, v_BKLD = (
        x_PGKD.view(size, -1, *x_PGKD.shape[2:]).transpose(1, 2) for x_PGKD in (k_PGKD, v_PGKD)
    )
    return k_BKLD, v_BKLD


def _taken(
    pages_NGKD: torch.Tensor,
    scale_NKG: torch.Tensor | None,
    ids: torch.Tensor | slice,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Some pages of keys or values, decoded where they hold codes."""

    def take(pages_N: torch.Tensor) -> torch.Tensor:
        return pages_N[ids] if isinstance(ids, slice) else pages_N.index_select(0, ids)

    if scale_NKG is None:
        return take(pages_NGKD)
    codes_PGKD = take(as_bytes(pages_NGKD)).view(pages_NGKD.dtype)
    return decode(codes_PGKD, take(scale_NKG).transpose(1, 2), dtype)


def _group_rows(batch: AttentionBatch) -> list[np.ndarray]:
    """Split the rows into few runs of similar query length, so that padding stays small."""
    lens = batch.query_lens_R
    order = np.argsort(lens, kind="stable")
    groups: list[np.ndarray] = []
    start = 0
    for i in range(1, len(order) + 1):
        if i == len(order) or _worth_a_cut(lens[order[start]], lens[order[i]]):
            groups.append(np.sort(order[start:i]))
            start = i
    return groups


def _worth_a_cut(shortest: int, longest: int) -> bool:
    return bool(longest > max(MAX_PADDING * shortest, 1))


def _bucket(
    batch: AttentionBatch,
    pages_RP: np.ndarray,
    own_start_R: np.ndarray,
    rows: np.ndarray,
    dtype: torch.dtype,
    group: int,
    window: int | None,
) -> Bucket:
    lens = batch.query_lens_R[rows]
    kv_lens = batch.kv_lens_R[rows]
    first_column = own_start_R[rows]
    columns = -(-kv_lens // batch.page_size) - first_column
    column_BP = first_column[:, None] + np.arange(columns.max())
    inside = np.arange(columns.max()) < columns[:, None]
    column_BP = np.minimum(column_BP, pages_RP.shape[1] - 1)
    pages = np.where(inside, pages_RP[rows[:, None], column_BP], 0)

    queries = np.arange(lens.max())
    valid_BQ = queries < lens[:, None]
    token_BQ = batch.query_start_R1[rows][:, None] + np.minimum(queries, lens[:, None] - 1)
    last_seen_BQ = np.minimum(kv_lens[:, None] - lens[:, None] + queries, kv_lens[:, None] - 1)
    kv_position_BL = (first_column * batch.page_size)[:, None] + np.arange(
        columns.max() * batch.page_size
    )
    visible_BQL = kv_position_BL[:, None, :] <= last_seen_BQ[:, :, None]
    if window is not None:
        visible_BQL &= kv_position_BL[:, None, :] > last_seen_BQ[:, :, None] - window
    bias = torch.zeros(visible_BQL.shape, dtype=dtype)
    bias.masked_fill_(~torch.from_numpy(visible_BQL), float("-inf"))
    tokens = token_BQ[valid_BQ]
    contiguous = bool(valid_BQ.all() and np.all(np.diff(tokens) == 1))
    return Bucket(
        token_BQ=torch.from_numpy(token_BQ).to(batch.device),
        valid_BQ=torch.from_numpy(valid_BQ).to(batch.device),
        pages=torch.from_numpy(pages.reshape(-1).astype(np.int64)).to(batch.device),
        bias_B1NL=bias.repeat_interleave(group, dim=1).unsqueeze(1).to(batch.device),
        flat=(int(tokens[0]), int(tokens[-1]) + 1) if contiguous else None,
    )


def _shared_run(batch: AttentionBatch, pages_RP: np.ndarray, segment: Segment) -> SharedRun:
    ids = pages_RP[segment.row_start, segment.page_start : segment.page_stop].astype(np.int64)
    pages: torch.Tensor | slice = slice(int(ids[0]), int(ids[-1]) + 1)
    if not np.all(np.diff(ids) == 1):
        pages = torch.from_numpy(ids).to(batch.device)
    return SharedRun(
        start=int(batch.query_start_R1[segment.row_start]),
        stop=int(batch.query_start_R1[segment.row_stop]),
        pages=pages,
    )
