"""Kernels that start while the one before them still runs: for the chains of short kernels that
steps of few rows are.

From compute capability 9.0 on, a kernel that is launched so may start as soon as every program of
the one before it has begun ("programmatic dependent launch" of the CUDA programming guide, used
here as Triton's tutorial 11 shows). It waits for what that one writes by an instruction; until
then it fetches what no kernel of a step writes: weights.

Two rules make this safe. Every kernel that is launched early waits before it reads or writes
anything but weights, so that its end means the end of all before it. And the first kernel of a
step is launched plainly: it begins when all work before the step has ended, an update of weights
too, and no later kernel of the step can begin before it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

MOST_ROWS = 16
"""Rows of a step up to which its kernels are short enough to gain."""
_LINE: tl.constexpr = tl.constexpr(64)
"""Elements of 16 bits in a line of the cache."""


def early_start(x: torch.Tensor) -> dict[str, Any]:
    """Arguments of the launch of a kernel over the rows of x that calls `let_next_start` and
    `wait_for_last`: early for few rows where the GPU can do it, else plain."""
    early = 0 < len(x) <= MOST_ROWS and x.is_cuda and _is_able(x.device)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


def _is_able(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def let_next_start(EARLY: tl.constexpr) -> None:
    """First in a kernel: the next one may start once every program of this one has come here."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_last(EARLY: tl.constexpr) -> None:
    """Until the kernel before has ended and what it wrote can be read."""
    if EARLY:
        tl.extra.cuda.gdc_wait()


@triton.jit
def fetch_row(row_ptr: tl.tensor, SIZE: tl.constexpr, EARLY: tl.constexpr) -> None:
    """Ask for `SIZE` elements of 16 bits, a power of two, from `row_ptr` on, to have them in the
    cache after the wait."""
    if EARLY:
        LINES: tl.constexpr = SIZE // _LINE if SIZE > _LINE else 1
        line = (row_ptr + tl.arange(0, LINES) * _LINE).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [line],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
