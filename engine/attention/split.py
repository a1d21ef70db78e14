"""Prefill by one back end and decode by another.

Legend: T tokens of the step, R rows, H query heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from engine.attention.base import (
    AttentionBackend,
    AttentionBatch,
    AttentionStep,
    CapturableBackend,
    CapturedDecode,
    DecodeLayout,
)
from engine.attention.context import PoolWrites
from engine.kv.pool import KVPool
from engine.transfer import to_device


class SplitBackend:
    """Rows of one query go to `decode`, all others to `prefill`.

    A row's own query count decides, so which kernels serve it does not depend on its batch.
    """

    def __init__(
        self, pool: KVPool, *, prefill: AttentionBackend, decode: CapturableBackend
    ) -> None:
        self.name = f"{prefill.name}+{decode.name}"
        self._pool = pool
        self._prefill = prefill
        self._decode = decode

    def prepare(self, batch: AttentionBatch) -> AttentionStep:
        """Plan a step; only one with rows of both kinds is taken apart."""
        single_R = batch.query_lens_R == 1
        if single_R.all():
            return self._decode.prepare(batch)
        if not single_R.any():
            return self._prefill.prepare(batch)
        return SplitStep(
            writes=PoolWrites(self._pool, batch.write_slots_T),
            parts=[
                _part(batch, np.flatnonzero(single_R), self._decode),
                _part(batch, np.flatnonzero(~single_R), self._prefill),
            ],
        )

    def capture_decode(self, layout: DecodeLayout) -> CapturedDecode:
        """Captured steps are decode steps."""
        return self._decode.capture_decode(layout)


@dataclass(frozen=True)
class SplitStep:
    """A prepared step of two parts: (tokens, int64 on the device; step of their rows).

    writes: of all tokens, since a row may read a page that one of the other part fills.
    """

    writes: PoolWrites
    parts: list[tuple[torch.Tensor, AttentionStep]]

    def attend(self, layer_index: int, q_THD: torch.Tensor) -> torch.Tensor:
        """See `AttentionStep`."""
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        for tokens, step in self.parts:
            out_THD[tokens] = step.attend(layer_index, q_THD[tokens])
        return out_THD


def _part(
    batch: AttentionBatch, rows: np.ndarray, backend: AttentionBackend
) -> tuple[torch.Tensor, AttentionStep]:
    """The tokens of some rows, and the step of these rows alone."""
    lens = batch.query_lens_R[rows]
    starts = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(lens, out=starts[1:])
    first = np.repeat(batch.query_start_R1[rows] - starts[:-1], lens)
    tokens = to_device(first + np.arange(starts[-1]), batch.device)
    part = replace(
        batch,
        query_start_R1=starts,
        kv_lens_R=batch.kv_lens_R[rows],
        slots_R=batch.slots_R[rows],
        write_slots_T=batch.write_slots_T[tokens],
    )
    return tokens, backend.prepare(part)
