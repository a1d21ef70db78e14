"""From logits to tokens: the sampling state of every slot, and one step's draw.

Legend: S rows that sample, V vocabulary, k likeliest tokens.

The state sits on the device, one vector a parameter, indexed by slot. Which rows need more
than temperature is kept on the host as well, so that a step of plain rows takes the plain
kernel without asking the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.batch import RequestTable, StepBatch
from engine.config import KernelBackend
from engine.protocol import NewRow, RowSampling, TopLogprobs
from engine.transfer import to_device
from kernels.sampling import sample, top_logprobs


@dataclass(frozen=True)
class DrawOptions:
    """What the rows of a step ask of the draw, beyond temperature: steps that ask the same
    can be served by one captured graph."""

    filtered: bool = False
    entropy: bool = False


PLAIN = DrawOptions()


@dataclass(frozen=True)
class Drawn:
    """One token a row: int64 [S], its logprob float32 [S], and on request the entropies
    float32 [S] and the k likeliest tokens (ids, logprobs) [S, k]."""

    token_S: torch.Tensor
    logprob_S: torch.Tensor
    entropy_S: torch.Tensor | None = None
    top: tuple[torch.Tensor, torch.Tensor] | None = None


class Sampler:
    """Sampling parameters of every slot, and the draw."""

    def __init__(self, *, num_slots: int, device: torch.device, backend: KernelBackend) -> None:
        self._device = device
        self._backend = backend
        self._temperature = torch.ones(num_slots, device=device)
        self._top_k = torch.full((num_slots,), -1, dtype=torch.int64, device=device)
        self._top_p = torch.ones(num_slots, device=device)
        self._min_p = torch.zeros(num_slots, device=device)
        self._seed = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._filtered = np.zeros(num_slots, dtype=np.bool_)
        self._entropy = np.zeros(num_slots, dtype=np.bool_)
        self._top_logprobs = np.zeros(num_slots, dtype=np.int32)
        # Rows whose logits are changed before the draw; few, and handled one by one.
        self._edited: dict[int, tuple[RowSampling, int]] = {}

    def enter(self, rows: Sequence[NewRow]) -> None:
        """Take over the sampling parameters of the sequences that enter a slot."""
        if not rows:
            return
        params = [row.sampling for row in rows]
        slots = to_device(np.array([row.slot for row in rows]), self._device)
        self._set(self._temperature, slots, [p.temperature for p in params])
        self._set(self._top_k, slots, [p.top_k for p in params])
        self._set(self._top_p, slots, [p.top_p for p in params])
        self._set(self._min_p, slots, [p.min_p for p in params])
        self._set(self._seed, slots, [_as_int64(p.seed) for p in params])
        for row, p in zip(rows, params, strict=True):
            self._filtered[row.slot] = p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0
            self._entropy[row.slot] = p.entropy
            self._top_logprobs[row.slot] = p.top_logprobs
            if _edits_logits(p):
                self._edited[row.slot] = (p, row.prompt_len)
            else:
                self._edited.pop(row.slot, None)

    def temperature(self, slots_S: torch.Tensor) -> torch.Tensor:
        """Temperatures of some slots, float32 [S]."""
        return self._temperature[slots_S]

    def is_capturable(self, slots: np.ndarray) -> bool:
        """Whether `draw_plain` serves these rows: no edit and no top logprobs."""
        return not self._top_logprobs[slots].any() and not self.edits(slots)

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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`draw` for rows that are `is_capturable`: on a GPU it never asks the device.

        position_S: index of the new token in its sequence, int64. options: at least what the
        rows need. entropy_S: float32 [S], filled in place; needed where `options.entropy`.
        """
        return sample(
            logits_SV,
            self._temperature[slots_S],
            self._seed[slots_S],
            position_S,
            entropy_S=entropy_S,
            backend=self._backend,
            **(self._filters(slots_S) if options.filtered else {}),
        )

    def draw(
        self, logits_SV: torch.Tensor, batch: StepBatch, slots: np.ndarray, table: RequestTable
    ) -> Drawn:
        """Sample one token a row. `slots` is `batch.slots_S` on the host.

        logits_SV: float32 where `edits` is true: penalties, bias and bans change it in place.
        The random number of a row is drawn from (seed, index of the new token in its sequence).
        """
        self._edit(logits_SV, batch, slots, table)
        options, entropy_S, top = self.options(slots), None, None
        if options.entropy:
            entropy_S = torch.empty(len(slots), dtype=torch.float32, device=self._device)
        tokens, logprobs = self.draw_plain(
            logits_SV, batch.slots_S, batch.kv_lens_S, options, entropy_S
        )
        most = int(self._top_logprobs[slots].max(initial=0))
        if most > 0:
            top = top_logprobs(logits_SV, self._temperature[batch.slots_S], most)
        return Drawn(tokens, logprobs, entropy_S, top)

    def _filters(self, slots_S: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "top_k_S": self._top_k[slots_S],
            "top_p_S": self._top_p[slots_S],
            "min_p_S": self._min_p[slots_S],
        }

    def _set(self, state: torch.Tensor, slots: torch.Tensor, values: Sequence[float]) -> None:
        wide = np.int64 if state.dtype == torch.int64 else np.float32
        state[slots] = to_device(np.array(values, dtype=wide), self._device)

    def _edit(
        self, logits_SV: torch.Tensor, batch: StepBatch, slots: np.ndarray, table: RequestTable
    ) -> None:
        if not self._edited:
            return
        for row, slot in enumerate(slots.tolist()):
            if slot not in self._edited:
                continue
            params, prompt_len = self._edited[slot]
            length = int(batch.kv_lens_S[row])
            known = table.token_ids[slot, :length].long()
            edit_logits(logits_SV[row], known, prompt_len, params)


def edit_logits(
    logits_V: torch.Tensor, token_ids: torch.Tensor, prompt_len: int, params: RowSampling
) -> None:
    """Apply penalties, bias and bans to one row, in place.

    repetition_penalty divides positive and multiplies negative logits of every token seen in
    prompt or output (Keskar et al., CTRL, arXiv 1909.05858). frequency_penalty subtracts once
    per occurrence in the output, presence_penalty once for each token that occurs there (the
    OpenAI API's definition). `banned_ids` get -inf until `min_new_tokens` were produced.
    """
    if params.repetition_penalty != 1.0:
        seen = token_ids.unique()
        values = logits_V[seen]
        factor = params.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / factor, values * factor)
    output = token_ids[prompt_len:]
    if len(output) and (params.frequency_penalty or params.presence_penalty):
        ids, counts = output.unique(return_counts=True)
        logits_V[ids] -= params.frequency_penalty * counts + params.presence_penalty
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits_V.device)
        bias = torch.tensor(list(params.logit_bias.values()), device=logits_V.device)
        logits_V[ids] += bias.to(logits_V.dtype)
    if params.banned_ids and len(output) < params.min_new_tokens:
        logits_V[torch.tensor(params.banned_ids, device=logits_V.device)] = float("-inf")


def to_top(top: tuple[torch.Tensor, torch.Tensor]) -> TopLogprobs:
    """Device tensors (ids, logprobs) to their message."""
    ids, logprobs = top
    return TopLogprobs(ids=ids.cpu().numpy(), logprobs=logprobs.float().cpu().numpy())


def _edits_logits(params: RowSampling) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
        or bool(params.logit_bias)
        or (params.min_new_tokens > 0 and bool(params.banned_ids))
    )


def _as_int64(seed: int) -> int:
    """Any Python integer as the signed 64-bit value with the same low bits."""
    low = seed & 0xFFFF_FFFF_FFFF_FFFF
    return low - (1 << 64) if low >= 1 << 63 else low
