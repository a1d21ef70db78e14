"""What masks rule out, as the draw needs it. S rows, M of them masked, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from engine.protocol import StepMasks
from engine.transfer import Staging, to_device
from kernels.sampling import TokenMasks
from kernels.sampling.allowed import sample_allowed
from kernels.sampling.masks import restrict_


def masked_logits(logits_SV: torch.Tensor, rows_M: torch.Tensor, bits: np.ndarray) -> torch.Tensor:
    """The logits of some rows, -inf where their bits (`StepMasks.bits`) rule a token out."""
    found = _words(bits).view(np.int32)
    # What came in a frame cannot be written, which torch warns of.
    words = to_device(found if found.flags.writeable else found.copy(), logits_SV.device)
    return restrict_(logits_SV[rows_M], words)


def split_masks(masks: StepMasks, chosen_M: np.ndarray) -> tuple[StepMasks, StepMasks]:
    """The masks that `chosen_M` (bool) names, and the others."""
    if chosen_M.all():
        # By far most steps; the bits of many rows are megabytes.
        return masks, StepMasks(step=masks.step, rows=masks.rows[:0], bits=masks.bits[:0])
    parts = [
        StepMasks(step=masks.step, rows=masks.rows[own_M], bits=masks.bits[own_M])
        for own_M in (chosen_M, ~chosen_M)
    ]
    return parts[0], parts[1]


def token_masks(masks: StepMasks, num_rows: int, staging: Staging) -> TokenMasks:
    """Masks of some of `num_rows` rows on the device, as the draw takes them; one copy."""
    mask_S = np.full(num_rows, -1, np.int32)
    mask_S[masks.rows] = np.arange(len(masks.rows), dtype=np.int32)
    bits_MB, masks_S = staging.send([_words(masks.bits).view(np.int32), mask_S])
    return TokenMasks(bits_MB, masks_S)


@dataclass(frozen=True)
class PlainRows:
    """Parameters of S rows: temperature float32, seed and position int64, and on the host which
    have a filter, bool."""

    temperature_S: torch.Tensor
    seed_S: torch.Tensor
    position_S: torch.Tensor
    filtered: np.ndarray


Draw = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Tokens and logprobs of the rows of an index, int64."""


def draw_on_cpu(
    logits_SV: torch.Tensor,
    rows: PlainRows,
    masks: StepMasks,
    entropy_S: torch.Tensor | None,
    draw: Draw,
) -> tuple[torch.Tensor, torch.Tensor, StepMasks]:
    """Draw rows with a mask and no filter at once from what it allows, by `sample_allowed`, and all
    others by `draw`, which fills their entropies. What each row is given does not depend on the
    others. Returns tokens, logprobs, and the masks of the rows that still have to be drawn."""
    at_once = ~rows.filtered[masks.rows]
    own_M = torch.from_numpy(masks.rows[at_once].astype(np.int64))
    size = len(logits_SV)
    whole = len(own_M) == size
    token_S = torch.empty(size, dtype=torch.int64)
    logprob_S = torch.empty(size, dtype=torch.float32)
    entropy_M = None if entropy_S is None else torch.empty(len(own_M))
    token_M, logprob_M, settled_M = sample_allowed(
        logits_SV if whole else logits_SV[own_M],
        rows.temperature_S[own_M],
        rows.seed_S[own_M],
        rows.position_S[own_M],
        _allowed(masks.bits[at_once], logits_SV.shape[1]),
        entropy_M,
    )
    token_S[own_M], logprob_S[own_M] = token_M, logprob_M
    if entropy_S is not None and entropy_M is not None:
        entropy_S[own_M] = entropy_M
    left = np.ones(len(masks.rows), np.bool_)
    left[np.flatnonzero(at_once)[settled_M.numpy()]] = False
    others = torch.ones(size, dtype=torch.bool)
    others[own_M[settled_M]] = False
    if bool(others.any()):
        rows_O = others.nonzero().squeeze(1)
        token_S[rows_O], logprob_S[rows_O] = draw(rows_O)
    return (
        token_S,
        logprob_S,
        StepMasks(step=masks.step, rows=masks.rows[left], bits=masks.bits[left]),
    )


def _allowed(bits: np.ndarray, vocab_size: int) -> torch.Tensor:
    """Bits as booleans, [M, V]."""
    packed = _words(bits).view(np.uint8)
    flags = np.unpackbits(packed, axis=1, count=vocab_size, bitorder="little")
    return torch.from_numpy(flags.view(np.bool_))


def _words(bits: np.ndarray) -> np.ndarray:
    """`StepMasks.bits`, the lowest byte of a word first; to be read only."""
    found: np.ndarray = np.ascontiguousarray(bits, "<u4")
    return found
