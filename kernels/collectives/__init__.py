"""Collectives between the GPUs of one host that have mapped each other's memory.

Every rank of a group makes the same calls in the same order, with tensors of the same shape and
dtype, each on one stream; a CUDA graph may capture them. Sums are added in the order of the
ranks in float32 and rounded once: every rank gets the same bits, whatever else is in the batch, and
whether one shot or two brought them. How the ranks reach each other, and why no barrier
is needed: `exchange.py`. Plain torch, on what all ranks hold: `reference.py`.

x: contiguous float32, or bfloat16 or float16 of an even number of elements; `...` any dims, N
ranks, R rows, D width.
"""

from __future__ import annotations

import torch

from kernels.collectives.mailbox import NUM_LANES, Mailbox, open_mailbox, words_shape
from kernels.weighting import Weighting

__all__ = [
    "NUM_LANES",
    "Mailbox",
    "all_gather_rows",
    "all_reduce",
    "all_reduce_add_rms_norm",
    "can_send",
    "open_mailbox",
    "reduce_scatter_rows",
    "words_shape",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def can_send(x: torch.Tensor) -> bool:
    """Whether x is what the collectives take, its size aside: whole words of floats."""
    return (
        x.is_cuda
        and x.dtype in _DTYPES
        and x.is_contiguous()
        and x.nbytes % 4 == 0
        and x.data_ptr() % 4 == 0
    )


def all_reduce(x: torch.Tensor, mailbox: Mailbox, *, shots: int) -> torch.Tensor:
    """The sum of every rank's x [...].

    shots: 1 sends x to every rank. 2 sends a share to each, which sends back its sum: longer for
    few bytes, and less traffic from 3 ranks on. What is too much for the mailbox goes in pieces.
    """
    from kernels.collectives import triton

    return triton.all_reduce(x, mailbox, shots)


def all_gather_rows(x: torch.Tensor, mailbox: Mailbox) -> torch.Tensor:
    """Every rank's rows x [R, ...] below each other, [N * R, ...]. At most
    `Mailbox.source_bytes` of x."""
    from kernels.collectives import triton

    return triton.all_gather_rows(x, mailbox)


def reduce_scatter_rows(x: torch.Tensor, mailbox: Mailbox) -> torch.Tensor:
    """This rank's rows [R, ...] of the sum of every rank's x [N * R, ...]. Even numbers of
    elements in R rows, at most `Mailbox.source_bytes` of them."""
    from kernels.collectives import triton

    return triton.reduce_scatter_rows(x, mailbox)


def all_reduce_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    mailbox: Mailbox,
    *,
    weighting: Weighting = "rounded",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernels.norm.add_rms_norm` of the sum of every rank's x [..., D]: the same bits, in one
    kernel. D even in 16 bits. At most as many rows as fit the lanes: NUM_LANES of rows, or as many
    times more as a lane holds rows."""
    from kernels.collectives import triton

    return triton.all_reduce_add_rms_norm(x, residual, weight, eps, mailbox, weighting)
