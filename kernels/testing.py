"""What "equal" means for a kernel: one tolerance table, and a comparison that says where.

Used by tests and by the bench table only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch

from kernels.backend import KernelBackend
from kernels.kv_copy import write_kv
from kernels.rotary import KVTarget

TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (2e-5, 2e-5),
    torch.float16: (2e-3, 4e-3),
    torch.bfloat16: (1e-2, 2e-2),
}
"""(absolute, relative): about 2 units in the last place of values near 1, after a reduction."""


def assert_close(name: str, got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise AssertionError naming the first element that differs beyond `dtype`'s tolerance.

    NaN equals nothing, so that poisoned memory left unwritten shows. Integers compare
    exactly.
    """
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{name}: dtype {got.dtype}, not {want.dtype}"
    absolute, relative = TOLERANCES[dtype] if want.is_floating_point() else (0.0, 0.0)
    wide_got, wide_want = got.double(), want.double()
    near = (wide_got - wide_want).abs() <= absolute + relative * wide_want.abs()
    # An infinity is near everything by a relative bound: it must be the same one.
    fine = torch.where(wide_want.isinf(), wide_got == wide_want, near)
    if bool(fine.all()):
        return
    where = tuple((~fine).nonzero()[0].tolist())
    raise AssertionError(
        f"{name}: {int((~fine).sum())} of {fine.numel()} elements differ; first at {where}: "
        f"got {wide_got[where].item():.9g}, want {wide_want[where].item():.9g}"
    )


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with NaN (integers: the least value; booleans: True), in place: whoever reads it is
    found out."""
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(torch.iinfo(tensor.dtype).min)


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Within it, `torch.empty` and its kin hand out poisoned memory."""
    owners = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]
    with ExitStack() as stack:
        for owner, name in owners:
            allocate = _poisoning(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, allocate))
        yield


def _poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *args, **kwargs: poison(allocate(*args, **kwargs))


def triton_device() -> str:
    """Where Triton kernels run: "cuda", or "cpu" under Triton's interpreter."""
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@dataclass(frozen=True, eq=False)
class RotatedHeads:
    """Queries [T, H, D], keys and values [T, K, D] that are rotated already, as back ends of
    attention take those of a layer (`engine.attention.base.NewHeads`)."""

    q_THD: torch.Tensor
    k_TKD: torch.Tensor
    v_TKD: torch.Tensor

    def store(self, target: KVTarget) -> torch.Tensor:
        """Write keys and values; the queries."""
        backend: KernelBackend = "triton" if self.q_THD.is_cuda else "torch"
        pages = (target.k_pages_NGKD, target.v_pages_NGKD)
        write_kv(
            self.k_TKD, self.v_TKD, *pages, target.slots_T, scales=target.scales, backend=backend
        )
        return self.q_THD

    def rotated(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All three."""
        return self.q_THD, self.k_TKD, self.v_TKD
