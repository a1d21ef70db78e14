"""From logits to tokens: the sampling state of every slot, and one step's draw.

Legend: S rows that sample, V vocabulary, k likeliest tokens.

The state sits on the device, one vector a parameter, indexed by slot. Which rows need more
than temperature is kept on the host as well, so that a step of plain rows takes the plain
kernel without asking the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from engine.batch import RequestTable
from engine.config import KernelBackend
from engine.logit_edits import LogitEdit, edit_logits, edit_of
from engine.mask_table import MaskTable, RowMasks, token_masks
from engine.masked_draw import (
    PlainRows,
    draw_on_cpu,
    masked_logits,
)
from engine.protocol import NewRow, TopLogprobs
from engine.transfer import Staging, to_device
from kernels.sampling import TokenMasks, moved_logprobs, named_logprobs, sample, top_logprobs


@dataclass(frozen=True)
class DrawOptions:
    """What the rows of a step ask of the draw, beyond temperature: steps that ask the same
    can be served by one captured graph."""

    filtered: bool = False
    entropy: bool = False


PLAIN = DrawOptions()
_NO_IDS = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Top:
    """The likeliest and the named tokens of some rows, as `TopLogprobs` has them: `rows` int32 [T]
    on the host, indices into the S rows; ids int32 and logprobs float32 [T, k] on the device."""

    rows: np.ndarray
    ids: torch.Tensor
    logprobs: torch.Tensor


@dataclass(frozen=True)
class Drawn:
    """One token a row: int64 [S], its logprob float32 [S], and on request the entropies
    float32 [S] and the likeliest and named tokens of the rows that asked."""

    token_S: torch.Tensor
    logprob_S: torch.Tensor
    entropy_S: torch.Tensor | None = None
    top: Top | None = None


class DrawnRows(Protocol):
    """What a draw reads of a batch, int64 [S] on the device."""

    @property
    def slots_S(self) -> torch.Tensor:
        """Slots of its sequences."""
        ...

    @property
    def kv_lens_S(self) -> torch.Tensor:
        """Index of the new token in each."""
        ...


class Sampler:
    """Sampling parameters of every slot, and the draw."""

    def __init__(self, *, num_slots: int, device: torch.device, backend: KernelBackend) -> None:
        self._device = device
        self._backend = backend
        self._staging = Staging(device)
        self.masks = MaskTable(device)
        self._temperature = torch.ones(num_slots, device=device)
        self._top_k = torch.full((num_slots,), -1, dtype=torch.int64, device=device)
        self._top_p = torch.ones(num_slots, device=device)
        self._min_p = torch.zeros(num_slots, device=device)
        self._seed = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._filtered = np.zeros(num_slots, dtype=np.bool_)
        self._entropy = np.zeros(num_slots, dtype=np.bool_)
        self._masked_law = np.zeros(num_slots, dtype=np.bool_)
        self._top_logprobs = np.zeros(num_slots, dtype=np.int32)
        self._alternatives = np.zeros(num_slots, dtype=np.int32)
        # Tokens whose logprobs are wanted by name; few rows have any.
        self._named: dict[int, np.ndarray] = {}
        # Rows whose logits are changed before the draw; few, and handled one by one.
        self._edited: dict[int, LogitEdit] = {}

    def enter(self, rows: Sequence[NewRow]) -> None:
        """Take over the sampling parameters of the sequences that enter a slot."""
        if not rows:
            return
        params = [row.sampling for row in rows]
        # All of it is made first: numbers that no table holds raise before anything is changed.
        slots = np.array([row.slot for row in rows])
        columns: list[tuple[torch.Tensor, np.ndarray]] = [
            (self._temperature, np.array([p.temperature for p in params], np.float32)),
            (self._top_k, np.array([p.top_k for p in params], np.int64)),
            (self._top_p, np.array([p.top_p for p in params], np.float32)),
            (self._min_p, np.array([p.min_p for p in params], np.float32)),
            (self._seed, np.array([_as_int64(p.seed) for p in params], np.int64)),
        ]
        filtered = [p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0 for p in params]
        top = np.array([p.top_logprobs for p in params], np.int32)
        alternatives = np.array([p.num_alternatives for p in params], np.int32)
        named = [np.array(p.logprob_ids, np.int64) for p in params]
        edits = [edit_of(row, self._device) for row in rows]
        slots_N = to_device(slots, self._device)
        for state, values in columns:
            state[slots_N] = to_device(values, self._device)
        self._filtered[slots], self._top_logprobs[slots] = filtered, top
        self._alternatives[slots] = alternatives
        self._entropy[slots] = [p.entropy for p in params]
        self._masked_law[slots] = [p.masked_law for p in params]
        for slot, edit, ids in zip(slots.tolist(), edits, named, strict=True):
            self._edited.pop(slot, None)
            self._named.pop(slot, None)
            if edit is not None:
                self._edited[slot] = edit
            if len(ids):
                self._named[slot] = ids

    def temperature(self, slots_S: torch.Tensor) -> torch.Tensor:
        """Temperatures of some slots, float32 [S]."""
        return self._temperature[slots_S]

    def is_capturable(self, slots: np.ndarray) -> bool:
        """Whether `draw_plain` serves these rows: no edit and no logprobs of other tokens."""
        return not self._alternatives[slots].any() and not self.edits(slots)

    def options(self, slots: np.ndarray) -> DrawOptions:
        """What `draw_plain` has to be told for these rows."""
        return DrawOptions(
            filtered=bool(self._filtered[slots].any()), entropy=bool(self._entropy[slots].any())
        )

    def edits(self, slots: np.ndarray) -> bool:
        """Whether the logits of any of these rows are changed before the draw."""
        return bool(self._edited) and not self._edited.keys().isdisjoint(slots.tolist())

    def draw_plain(
        self,
        logits_SV: torch.Tensor,
        slots_S: torch.Tensor,
        position_S: torch.Tensor,
        options: DrawOptions = PLAIN,
        entropy_S: torch.Tensor | None = None,
        masks: TokenMasks | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`draw` for rows that are `is_capturable`: on a GPU it never asks the device.

        position_S: index of the new token in its sequence, int64. options: at least what the
        rows need. entropy_S: float32 [S], filled in place; needed where `options.entropy`.
        masks: of rows without a filter; numbers stay those of the law without a mask.
        """
        return sample(
            logits_SV,
            self._temperature[slots_S],
            self._seed[slots_S],
            position_S,
            entropy_S=entropy_S,
            masks=masks,
            backend=self._backend,
            **(self._filters(slots_S) if options.filtered else {}),
        )

    def draw(
        self,
        logits_SV: torch.Tensor,
        batch: DrawnRows,
        slots: np.ndarray,
        table: RequestTable,
        masks: RowMasks | None = None,
    ) -> Drawn:
        """Sample one token a row. `slots` is `batch.slots_S` on the host.

        logits_SV: float32 where `edits` is true: penalties, bias and bans change it in place, and
        masks do in rows of `RowSampling.masked_law`. The random number of a row is drawn from
        (seed, index of the new token in its sequence).
        masks: which tokens may come in some rows. Of these rows too, logprobs, entropies and
        alternatives are those of the law without a mask, but where the masked law is asked for.
        """
        self._edit(logits_SV, batch, slots, table)
        if masks is not None:
            masks = self._take_masked_law(logits_SV, slots, masks)
        options, entropy_S, top = self.options(slots), None, None
        if options.entropy:
            entropy_S = torch.empty(len(slots), dtype=torch.float32, device=self._device)
        if masks is not None and len(masks.rows):
            draw = self._draw_on_cpu if self._device.type == "cpu" else self._draw_on_gpu
            tokens, logprobs, masks = draw(logits_SV, batch, slots, masks, entropy_S)
        else:
            tokens, logprobs = self.draw_plain(
                logits_SV, batch.slots_S, batch.kv_lens_S, options, entropy_S
            )
        if masks is not None and len(masks.rows):
            self._draw_masked(logits_SV, batch, slots, masks, tokens, logprobs)
        rows = np.flatnonzero(self._alternatives[slots]).astype(np.int32)
        if len(rows):
            # Only of the rows that ask: the others pay nothing for a neighbour's wide answer.
            rows_T = to_device(rows.astype(np.int64), self._device)
            temperature_T = self._temperature[batch.slots_S[rows_T]]
            top = Top(rows, *self._others(logits_SV[rows_T], temperature_T, slots[rows]))
        return Drawn(tokens, logprobs, entropy_S, top)

    def _draw_on_cpu(
        self,
        logits_SV: torch.Tensor,
        batch: DrawnRows,
        slots: np.ndarray,
        masks: RowMasks,
        entropy_S: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, RowMasks]:
        """As `draw_on_cpu`: masked rows for which one pass over the vocabulary does."""

        def draw(rows_O: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            options = self.options(slots[rows_O.numpy()])
            entropy_O = torch.empty(len(rows_O)) if options.entropy else None
            drawn = self.draw_plain(
                logits_SV[rows_O],
                batch.slots_S[rows_O],
                batch.kv_lens_S[rows_O],
                options,
                entropy_O,
            )
            if entropy_S is not None and entropy_O is not None:
                entropy_S[rows_O] = entropy_O
            return drawn

        rows = PlainRows(
            self._temperature[batch.slots_S],
            self._seed[batch.slots_S],
            batch.kv_lens_S,
            self._filtered[slots],
        )
        return draw_on_cpu(logits_SV, rows, masks, entropy_S, draw)

    def _draw_on_gpu(
        self,
        logits_SV: torch.Tensor,
        batch: DrawnRows,
        slots: np.ndarray,
        masks: RowMasks,
        entropy_S: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, RowMasks]:
        """Draw all rows, those that have a mask and no filter from what it allows. Returns tokens,
        logprobs, and the masks of the rows that still have to be drawn."""
        filtered = self._filtered[slots[masks.rows]]
        own, left = masks.of(~filtered), masks.of(filtered)
        tokens, logprobs = self.draw_plain(
            logits_SV,
            batch.slots_S,
            batch.kv_lens_S,
            self.options(slots),
            entropy_S,
            token_masks(own, len(slots), self._staging) if len(own.rows) else None,
        )
        return tokens, logprobs, left

    def _draw_masked(
        self,
        logits_SV: torch.Tensor,
        batch: DrawnRows,
        slots: np.ndarray,
        masks: RowMasks,
        token_S: torch.Tensor,
        logprob_S: torch.Tensor,
    ) -> None:
        """Put tokens that their masks allow, and the logprobs of these, in the place of what the
        masked rows drew; a logprob that is not finite stays."""
        rows_M = to_device(masks.rows.astype(np.int64), self._device)
        slots_M = batch.slots_S[rows_M]
        logits_MV = masked_logits(logits_SV, rows_M, masks)
        # Filters are of the masked law: the k likeliest of what may come.
        options = DrawOptions(filtered=bool(self._filtered[slots[masks.rows]].any()))
        token_M, _ = self.draw_plain(logits_MV, slots_M, batch.kv_lens_S[rows_M], options)
        logprob_S[rows_M] = moved_logprobs(
            logits_SV,
            rows_M,
            self._temperature[slots_M],
            token_M,
            known_M=token_S[rows_M],
            logprob_M=logprob_S[rows_M],
        )
        token_S[rows_M] = token_M

    def _take_masked_law(
        self, logits_SV: torch.Tensor, slots: np.ndarray, masks: RowMasks
    ) -> RowMasks:
        """Make the law of the rows that ask for the masked one what it says of them, in place; the
        masks of the others."""
        asks = self._masked_law[slots[masks.rows]]
        if not asks.any():
            return masks
        rows_M = to_device(masks.rows[asks].astype(np.int64), self._device)
        logits_MV = masked_logits(logits_SV, rows_M, masks.of(asks))
        # A row that is broken has to show it.
        whole_M1 = logits_SV[rows_M].amax(-1, keepdim=True).isfinite()
        logits_SV[rows_M] = torch.where(whole_M1, logits_MV, logits_SV[rows_M])
        return masks.of(~asks)

    def _others(
        self, logits_TV: torch.Tensor, temperature_T: torch.Tensor, slots_T: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and logprobs, both [T, k], as `StepResult.top` has them."""
        counts_T = self._top_logprobs[slots_T]
        top = top_logprobs(logits_TV, temperature_T, int(counts_T.max()))
        if self._named.keys().isdisjoint(slots_T.tolist()):
            return top
        named = [self._named.get(slot, _NO_IDS) for slot in slots_T.tolist()]
        ids, columns, width = _places(named, counts_T)
        ids_TN, columns_TN = to_device(ids, self._device), to_device(columns, self._device)
        values_TN = named_logprobs(logits_TV, temperature_T, ids_TN)
        wide = [_widened(part, width + 1) for part in top]
        wide[0].scatter_(1, columns_TN, ids_TN.int())
        wide[1].scatter_(1, columns_TN, values_TN)
        return wide[0][:, :width].contiguous(), wide[1][:, :width].contiguous()

    def _filters(self, slots_S: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "top_k_S": self._top_k[slots_S],
            "top_p_S": self._top_p[slots_S],
            "min_p_S": self._min_p[slots_S],
        }

    def _edit(
        self, logits_SV: torch.Tensor, batch: DrawnRows, slots: np.ndarray, table: RequestTable
    ) -> None:
        if not self._edited:
            return
        for row, slot in enumerate(slots.tolist()):
            if slot not in self._edited:
                continue
            length = int(batch.kv_lens_S[row])
            known = table.token_ids[slot, :length].long()
            edit_logits(logits_SV[row], known, self._edited[slot])


def _places(named: list[np.ndarray], counts_T: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """The named ids of T rows, padded with 0, and the column of each: behind the `counts_T`
    likeliest of its row. Both int64 [T, N]. How many columns there are; the padding is put behind
    them."""
    sizes = np.array([len(found) for found in named])
    ids, columns = np.zeros((2, len(named), int(sizes.max())), np.int64)
    width = int((counts_T + sizes).max())
    columns[:] = width
    for row, (found, count) in enumerate(zip(named, counts_T.tolist(), strict=True)):
        ids[row, : len(found)] = found
        columns[row, : len(found)] = count + np.arange(len(found))
    return ids, columns, width


def _widened(values_Tk: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(values_Tk, (0, width - values_Tk.shape[1]))


def to_top(ids: torch.Tensor, logprobs: torch.Tensor) -> TopLogprobs:
    """Device tensors to their message."""
    return TopLogprobs(ids=ids.cpu().numpy(), logprobs=logprobs.float().cpu().numpy())


def _as_int64(seed: int) -> int:
    """Any Python integer as the signed 64-bit value with the same low bits."""
    low = seed & 0xFFFF_FFFF_FFFF_FFFF
    return low - (1 << 64) if low >= 1 << 63 else low
