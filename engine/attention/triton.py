"""Attention by our Triton kernels: paged decode and paged prefill on a GPU.

Legend: T tokens, R rows, H query heads, K kv heads, D head dim, P page columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from engine.attention.base import AttentionBatch, DecodeLayout
from engine.attention.context import PoolWrites
from engine.attention.groups import GroupRule, GroupTracker, most_tiles, tile_groups
from engine.kv.layout import HeadLayout, common_heads, head_pages
from engine.kv.pool import KVPool
from engine.transfer import to_device
from kernels.attention import SharedTiles, paged_attention
from kernels.attention.tiles import MAX_SPLITS, MIN_SPLIT, TILE_ROWS

SAVED_BYTES = 256e6
PROGRAMS = 64


def group_rule(layout: HeadLayout) -> GroupRule:
    """From when shared pages are read once for a tile of rows.

    A tile costs a launch and its own walk over the shared tokens, about 10 us and 3.6 us for
    every 128 tokens, while a row that reads them again finds them in the L2 cache, in the
    shadow of what it reads from memory. So a batch must save much, and fill the GPU with
    tiles. On an H100 (heads of 128, bf16), microseconds of a layer:

        groups x rows, shared + own       saved MB   plain   grouped
        1.5B 64 x 16, 512 + 64                 503     104        68
        1.5B 64 x 16, 512 + 512                503     241       219
        1.5B 64 x 16, 512 + 1,023              503     404       393
        1.5B 64 x 16, 1,024 + 512             1007     303       232
        8B 16 x 16, 512 + 256                  503     155       123
        7B 32 x 8, 1,024 + 512                 470     166       138
        1.5B 32 x 16, 512 + 256, 512 lone      252     214       214

    Codes of fp8 KV count as the 16-bit elements that they become: a row that reads them again
    decodes them again too.
    """
    elements = layout.num_kv_heads * (layout.key_dim + layout.value_dim)
    position_bytes = elements * layout.dtype.itemsize
    return GroupRule(
        unit=MIN_SPLIT,
        min_rows=4,
        min_tokens=2 * MIN_SPLIT,
        tile_rows=TILE_ROWS,
        max_kv_len=MAX_SPLITS * MIN_SPLIT,
        min_saved=int(SAVED_BYTES / position_bytes),
        min_tiles=-(-PROGRAMS // layout.num_kv_heads),
    )


class TritonBackend:
    """Back end over `kernels.attention` with its Triton kernels."""

    name = "triton"

    def __init__(self, pool: KVPool, *, scale: float, share_prefixes: bool = True) -> None:
        layout = common_heads(pool.layouts)
        self._pool = pool
        self._scale = scale
        self._tracker: GroupTracker | None = None
        # Tiles of wider elements or heads hold too few rows to gain anything.
        if share_prefixes and layout.dtype.itemsize == 2 and layout.key_dim <= 128:
            self._tracker = GroupTracker(pool.page_size, group_rule(layout))

    def prepare(self, batch: AttentionBatch) -> TritonStep:
        """Bring the row layout to the device in one copy."""
        starts, lens = len(batch.query_start_R1), len(batch.kv_lens_R)
        packed = np.concatenate([batch.query_start_R1, batch.kv_lens_R, batch.slots_R])
        query_start, kv_lens, rows = to_device(packed.astype("int32"), batch.device).split(
            [starts, lens, lens]
        )
        return TritonStep(
            writes=PoolWrites(self._pool, batch.write_slots_T),
            pool=self._pool,
            scale=self._scale,
            page_table=batch.page_table,
            table_rows_R=rows,
            query_start_R1=query_start,
            kv_lens_R=kv_lens,
            max_query_len=int(batch.query_lens_R.max()),
            max_kv_len=int(batch.kv_lens_R.max()),
        )

    def capture_decode(self, layout: DecodeLayout) -> TritonDecode:
        """See `CapturableBackend`: the kernels read the layout's tensors in place."""
        plain = TritonStep(
            writes=PoolWrites(self._pool, layout.write_slots_R),
            pool=self._pool,
            scale=self._scale,
            page_table=layout.page_table,
            table_rows_R=layout.slots_R,
            query_start_R1=layout.query_start_R1,
            kv_lens_R=layout.kv_lens_R,
            max_query_len=1,
            max_kv_len=layout.max_kv_len,
            run=layout.run,
        )
        tracker = self._tracker
        if tracker is not None and layout.rows < tracker.rule.min_tiles * tracker.rule.min_rows:
            tracker = None
        return TritonDecode(plain, layout, tracker)


@dataclass(frozen=True, eq=False)
class TritonStep:
    """One prepared step. table_rows_R: where each row's pages are in `page_table`. shared: of the
    layers without a window; those with one read too little to share. run: as in `DecodeLayout`."""

    writes: PoolWrites
    pool: KVPool
    scale: float
    page_table: torch.Tensor
    table_rows_R: torch.Tensor
    query_start_R1: torch.Tensor
    kv_lens_R: torch.Tensor
    max_query_len: int
    max_kv_len: int
    shared: SharedTiles | None = None
    run: int = 1

    def attend(self, layer_index: int, q_THD: torch.Tensor) -> torch.Tensor:
        """See `AttentionStep`."""
        k_NGKD, v_NGKD, scales = head_pages(self.pool.layer(layer_index))
        window = self.pool.layouts[layer_index].window
        return paged_attention(
            q_THD,
            k_NGKD,
            v_NGKD,
            self.page_table,
            self.query_start_R1,
            self.kv_lens_R,
            scale=self.scale,
            max_query_len=self.max_query_len,
            window=window,
            table_rows_R=self.table_rows_R,
            max_kv_len=self.max_kv_len,
            shared=self.shared if window is None else None,
            run=self.run,
            scales=scales,
            backend="triton",
        )


class TritonDecode:
    """Attention of the graphs of one layout: `step` reads shared pages once where some rows
    share enough, and launches nothing for it where none do."""

    def __init__(
        self, plain: TritonStep, layout: DecodeLayout, tracker: GroupTracker | None
    ) -> None:
        self.step = plain
        self._plain = self._grouped = plain
        self._layout = layout
        self._tracker = tracker
        self._version = 0
        tiles = 0 if tracker is None else most_tiles(layout.rows, tracker.rule)
        self._sent = layout.slots_R.new_zeros(3 * tiles + layout.rows)
        if tracker is not None:
            tile_T3 = self._sent[: 3 * tiles].view(tiles, 3)
            self._grouped = replace(plain, shared=SharedTiles(tile_T3, self._sent[3 * tiles :]))

    def refresh(self, slots: np.ndarray, kv_lens: np.ndarray, *, exact: bool = True) -> None:
        """See `CapturedDecode`. Sends the groups when they are others than last time. Rows that
        are not known for sure share nothing: the first of a tile has to be what it seems."""
        if self._tracker is None:
            return
        if not exact:
            self.step = self._plain
            return
        self._tracker.update(slots, kv_lens, self._layout.host_pages)
        groups = self._tracker.groups
        self.step = self._grouped if groups else self._plain
        if groups and self._tracker.version != self._version:
            packed = tile_groups(groups, self._layout.rows, self._tracker.rule)
            self._sent.copy_(to_device(packed, self._sent.device))
            self._version = self._tracker.version
