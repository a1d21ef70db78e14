"""The collectives on GPU: from tensors to words, and the launches.

N ranks, R rows, D width; `...` any dims.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.collectives.mailbox import NUM_LANES, Mailbox
from kernels.collectives.normed import normed_kernel
from kernels.collectives.one_shot import one_shot_kernel
from kernels.collectives.plan import Cut, choose, programs, share_words
from kernels.collectives.two_shot import two_shot_kernel
from kernels.norm.triton import row_block
from kernels.weighting import Weighting

_NUMBERS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def all_reduce(
    x: torch.Tensor, mailbox: Mailbox, shots: int, cut: Cut | None = None
) -> torch.Tensor:
    """See `kernels.collectives.all_reduce`. cut: in place of the plan's."""
    out = torch.empty_like(x)
    x_words, out_words = _words(x), _words(out)
    most = mailbox.source_bytes // 4
    if shots == 1:
        for words, sums in zip(x_words.split(most), out_words.split(most), strict=True):
            if len(words):
                _one_shot(words, sums, len(words), mailbox, x.dtype, cut, reduce=True)
        return out
    most = most // 2 * mailbox.size
    for words, sums in zip(x_words.split(most), out_words.split(most), strict=True):
        if len(words):
            _two_shot(words, sums, mailbox, x.dtype, cut)
    return out


def all_gather_rows(x: torch.Tensor, mailbox: Mailbox, cut: Cut | None = None) -> torch.Tensor:
    """See `kernels.collectives.all_gather_rows`."""
    out = x.new_empty(mailbox.size * x.shape[0], *x.shape[1:])
    x_words = _words(x)
    if len(x_words):
        _one_shot(x_words, _words(out), len(x_words), mailbox, x.dtype, cut, reduce=False)
    return out


def reduce_scatter_rows(x: torch.Tensor, mailbox: Mailbox, cut: Cut | None = None) -> torch.Tensor:
    """See `kernels.collectives.reduce_scatter_rows`."""
    out = x.new_empty(x.shape[0] // mailbox.size, *x.shape[1:])
    out_words = _words(out)
    if len(out_words):
        _one_shot(
            _words(x), out_words, len(out_words), mailbox, x.dtype, cut, scatter=True, reduce=True
        )
    return out


def all_reduce_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    mailbox: Mailbox,
    weighting: Weighting = "rounded",
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.collectives.all_reduce_add_rms_norm`."""
    out, total = torch.empty_like(x), torch.empty_like(x)
    width = x.shape[-1]
    x_words = _words(x)
    row_words = width * x.element_size() // 4
    rows = len(x_words) // row_words
    if not rows:
        return out, total
    block, warps = row_block(width)
    lanes = min(rows, NUM_LANES)
    assert triton.cdiv(rows, lanes) * row_words <= mailbox.lane_words, "more than a lane holds"
    normed_kernel[(lanes,)](
        x_words,
        _words(residual),
        weight,
        out,
        total,
        _words(total),
        mailbox.addresses,
        mailbox.turns,
        mailbox.give_up,
        rows,
        eps,
        RANK=mailbox.rank,
        SIZE=mailbox.size,
        LANES=NUM_LANES,
        LANE_WORDS=mailbox.lane_words,
        D=width,
        ROW_WORDS=row_words,
        BLOCK=block,
        BLOCK_WORDS=triton.next_power_of_2(row_words),
        DTYPE=_NUMBERS[x.dtype],
        WIDE=weighting != "rounded",
        OFFSET=weighting == "offset",
        num_warps=warps,
    )
    return out, total


def _two_shot(
    x_words: torch.Tensor,
    out_words: torch.Tensor,
    mailbox: Mailbox,
    dtype: torch.dtype,
    cut: Cut | None,
) -> None:
    share = share_words(len(x_words), mailbox.size)
    cut = cut or choose(share)
    two_shot_kernel[(programs(share, cut, mailbox.lane_words // 2),)](
        x_words,
        out_words,
        mailbox.addresses,
        mailbox.turns,
        mailbox.give_up,
        len(x_words),
        share,
        RANK=mailbox.rank,
        SIZE=mailbox.size,
        LANES=NUM_LANES,
        LANE_WORDS=mailbox.lane_words,
        TILE=cut.tile,
        DTYPE=_NUMBERS[dtype],
        num_warps=cut.warps,
    )


def _one_shot(
    x_words: torch.Tensor,
    out_words: torch.Tensor,
    num_words: int,
    mailbox: Mailbox,
    dtype: torch.dtype,
    cut: Cut | None,
    *,
    reduce: bool,
    scatter: bool = False,
) -> None:
    cut = cut or choose(num_words)
    one_shot_kernel[(programs(num_words, cut, mailbox.lane_words),)](
        x_words,
        out_words,
        mailbox.addresses,
        mailbox.turns,
        mailbox.give_up,
        num_words,
        RANK=mailbox.rank,
        SIZE=mailbox.size,
        LANES=NUM_LANES,
        LANE_WORDS=mailbox.lane_words,
        TILE=cut.tile,
        SCATTER=scatter,
        REDUCE=reduce,
        DTYPE=_NUMBERS[dtype],
        num_warps=cut.warps,
    )


def _words(x: torch.Tensor) -> torch.Tensor:
    """x as int32 [words], the same memory."""
    assert x.is_contiguous() and x.dtype in _NUMBERS
    return x.view(-1).view(torch.int32)
