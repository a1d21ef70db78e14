"""What masks rule out, as the draw needs it. M masked rows, V vocabulary, B bytes of a mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from engine.protocol import StepMasks
from engine.transfer import to_device
from kernels.sampling.allowed import sample_allowed

_LOWEST_LOGIT = -1e30
"""Divided by the lowest temperature it is still a float32."""


def masked_logits(logits_SV: torch.Tensor, rows_M: torch.Tensor, bits: np.ndarray) -> torch.Tensor:
    """The logits of some rows, -inf where their bits (`StepMasks.bits`) rule a token out."""
    banned_MV = banned_tokens(to_device(_as_bytes(bits), logits_SV.device), logits_SV)
    # What is allowed may come however unlikely it is; what is not never does.
    lowest = max(torch.finfo(logits_SV.dtype).min, _LOWEST_LOGIT)
    return logits_SV[rows_M].clamp_(min=lowest).masked_fill_(banned_MV, float("-inf"))


def banned_tokens(bytes_MB: torch.Tensor, logits_SV: torch.Tensor) -> torch.Tensor:
    """What masks rule out, bool [M, V]. bytes_MB: uint8 [M, B], the bytes of `StepMasks.bits`,
    lowest first; 8 * B is at least V."""
    bit_8 = 1 << torch.arange(8, dtype=torch.uint8, device=bytes_MB.device)
    return (bytes_MB.unsqueeze(-1) & bit_8).eq(0).flatten(1)[:, : logits_SV.shape[1]]


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
    flags = np.unpackbits(_bytes(bits), axis=1, count=vocab_size, bitorder="little")
    return torch.from_numpy(flags.view(np.bool_))


def _as_bytes(bits: np.ndarray) -> np.ndarray:
    """uint32 [M, W] as uint8 [M, 4 W], the lowest byte of a word first; to be read only."""
    found = _bytes(bits)
    # What came in a frame cannot be written, which torch warns of.
    return found if found.flags.writeable else found.copy()


def _bytes(bits: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.ascontiguousarray(bits, "<u4").view(np.uint8)
    return found
