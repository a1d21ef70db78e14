"""What masks rule out, as the draw needs it. S rows, M of them masked, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from engine.mask_table import RowMasks
from kernels.sampling.allowed import sample_allowed
from kernels.sampling.masks import restrict_


def masked_logits(logits_SV: torch.Tensor, rows_M: torch.Tensor, masks: RowMasks) -> torch.Tensor:
    """The logits of some rows, -inf where their masks rule a token out."""
    return restrict_(logits_SV[rows_M], masks.bits())


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
    masks: RowMasks,
    entropy_S: torch.Tensor | None,
    draw: Draw,
) -> tuple[torch.Tensor, torch.Tensor, RowMasks]:
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
        masks.of(at_once).allowed(logits_SV.shape[1]),
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
    return token_S, logprob_S, masks.of(left)
