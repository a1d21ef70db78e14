"""Masks, which say what tokens may be drawn in some rows, and the logits that they leave.

Shapes: S rows, M masks, V vocabulary, B words of 32 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

_LOWEST_LOGIT = -1e30
"""Divided by the lowest temperature it is still a float32."""


@dataclass(frozen=True)
class TokenMasks:
    """What may be drawn in the rows of a call of `kernels.sampling.sample`, on the logits' device.

    bits_MB: int32 [M, B], contiguous, 32 * B >= V. Bit t % 32 (the lowest is 0) of word t // 32 is
        1 where token t may be drawn. Bits beyond the vocabulary are not looked at.
    mask_S: int32 [S], the mask of each row; -1 where it has none. Rows may share one.
    """

    bits_MB: torch.Tensor
    mask_S: torch.Tensor

    def check(self, logits_SV: torch.Tensor) -> None:
        """Raise ValueError where shapes or types do not fit the logits."""
        (num_rows, vocab), words = logits_SV.shape, self.bits_MB.shape[1]
        if self.bits_MB.dtype != torch.int32 or not self.bits_MB.is_contiguous():
            raise ValueError("bits_MB has to be int32 and contiguous")
        if 32 * words < vocab:
            raise ValueError(f"bits_MB has {words} words, too few for {vocab} tokens")
        if self.mask_S.dtype != torch.int32 or self.mask_S.shape != (num_rows,):
            raise ValueError(f"mask_S has to be int32 [{num_rows}], the mask of each row")


@cache
def lowest_logit(dtype: torch.dtype) -> float:
    """What the logits of allowed tokens count as at least, a number of `dtype`: what is allowed may
    come however unlikely it is; what is not never does."""
    lowest = max(torch.finfo(dtype).min, _LOWEST_LOGIT)
    return float(torch.tensor(lowest, dtype=dtype))


def restrict_(logits_MV: torch.Tensor, bits_MB: torch.Tensor) -> torch.Tensor:
    """Make each row's logits, in place, those that a mask leaves: -inf where it rules a token out,
    and at least `lowest_logit` elsewhere. bits_MB: as in `TokenMasks`, a mask a row."""
    lowest = lowest_logit(logits_MV.dtype)
    banned_MV = banned_tokens(bits_MB, logits_MV.shape[1])
    return logits_MV.clamp_(min=lowest).masked_fill_(banned_MV, float("-inf"))


def banned_tokens(bits_MB: torch.Tensor, vocab: int) -> torch.Tensor:
    """What masks rule out, bool [M, V]. bits_MB: as in `TokenMasks`."""
    bit_8 = 1 << torch.arange(8, dtype=torch.uint8, device=bits_MB.device)
    bytes_MX = bits_MB.view(torch.uint8)
    return (bytes_MX.unsqueeze(-1) & bit_8).eq(0).flatten(1)[:, :vocab]
