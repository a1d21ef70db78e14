"""Programmatic dependent launch: a kernel starts before the one ahead of it in the stream ends.

On Hopper and later a kernel launched with Triton's `launch_pdl=True` may start once every
program of the kernel before it has called `release_next` or ended. It calls `await_previous`
before it touches anything that a kernel before it writes or reads; what it may do earlier is
fetch weights, which nothing in the stream is writing. Since every such kernel waits, the end of
one implies the end of all before it. See "Programmatic Dependent Launch" in NVIDIA's CUDA
programming guide.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def release_next() -> None:
    """Let the next kernel of the stream start its programs."""
    gdc_launch_dependents()


@triton.jit
def await_previous() -> None:
    """Wait until every kernel before this one has ended and its writes are visible."""
    gdc_wait()


@triton.jit
def prefetch(pointers: tl.tensor) -> None:
    """Start moving the 128-byte lines that the pointers lie in from memory to the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
