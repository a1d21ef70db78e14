"""Drafts from what sequences said before: the device's tables of texts to copy from.

Legend: R rows, K most drafts of a row, M sources of a slot, H tokens of the history.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.batch import RequestTable
from engine.config import KernelBackend, SpeculativeConfig
from engine.protocol import DraftSources
from engine.transfer import to_device
from kernels.speculative.ngram import propose


class NgramDrafter:
    """Looks for the last tokens of a row in its own text, in other rows and in finished ones."""

    def __init__(
        self, config: SpeculativeConfig, table: RequestTable, backend: KernelBackend
    ) -> None:
        num_slots, device = len(table.token_ids), table.device
        self._table = table
        self._backend = backend
        self._sources = torch.full(
            (num_slots, config.num_sources), -1, dtype=torch.int32, device=device
        )
        self._history = torch.zeros(config.history_tokens, dtype=torch.int32, device=device)
        self._segments = torch.zeros((config.num_segments, 2), dtype=torch.int32, device=device)

    def enter(self, changes: DraftSources) -> None:
        """Take over what changed: first the texts of sequences that leave, then who reads what."""
        for write in changes.writes:
            text = self._table.token_ids[write.slot, write.start : write.stop]
            self._history[write.at : write.at + len(text)] = text
        if changes.writes:
            places = [
                (write.segment, write.at, write.stop - write.start) for write in changes.writes
            ]
            segment, *place = to_device(np.array(places, np.int32).T.copy(), self._table.device)
            self._segments[segment.long()] = torch.stack(place, dim=1)
        if len(changes.slots):
            packed = np.stack([changes.slots, changes.columns, changes.ids])
            slots, columns, ids = to_device(_last_of_each(packed), self._table.device).unbind(0)
            self._sources[slots.long(), columns.long()] = ids

    def propose(
        self,
        slots_R: torch.Tensor,
        draft_lens_R: torch.Tensor,
        drafts_RK: torch.Tensor,
        drafted_R: torch.Tensor,
    ) -> None:
        """Fill `drafts_RK` and `drafted_R`, all int32; see `kernels.speculative.ngram.propose`."""
        table = self._table
        propose(
            slots_R,
            draft_lens_R,
            length=table.length,
            limit=table.limit,
            forced=table.forced,
            token_ids=table.token_ids,
            sources=self._sources,
            history=self._history,
            segments=self._segments,
            drafts_RK=drafts_RK,
            drafted_R=drafted_R,
            backend=self._backend,
        )


def _last_of_each(packed_3U: np.ndarray) -> np.ndarray:
    """Of several changes of one place the last: a device writes them in any order."""
    places = packed_3U[0].astype(np.int64) << 32 | packed_3U[1]
    _, first = np.unique(places[::-1], return_index=True)
    kept: np.ndarray = np.ascontiguousarray(packed_3U[:, len(places) - 1 - np.sort(first)])
    return kept
