"""The filter kernel: kept sets one by one, and draws against the reference."""

from __future__ import annotations

import pytest
import torch

from kernels.sampling import sample
from kernels.testing import assert_close, poisoned_allocations, triton_device

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = 1e-5
"""Relative: how far float32 sums may be off at the edge of a nucleus."""


def interpreted() -> bool:
    return triton_device() == "cpu"


def check_set(
    kept: torch.Tensor, logits: torch.Tensor, divisor: float, top_k: int, top_p: float
) -> None:
    """`kept` [V] is the likeliest so and so many, and as many as the filters say."""
    scaled = logits.double() / divisor
    order = scaled.argsort(descending=True, stable=True)
    size = int(kept.sum())
    assert set(kept.nonzero().squeeze(1).tolist()) == set(order[:size].tolist())
    allowed = top_k if 0 < top_k < len(logits) else len(logits)
    if top_p >= 1:
        assert size == allowed
        return
    weights = (scaled - scaled.max()).exp()[order[:allowed]]
    target = top_p * weights.sum()
    assert 1 <= size <= allowed
    assert size == 1 or weights[: size - 1].sum() < target * (1 + ROUNDING)
    assert size == allowed or weights[:size].sum() >= target * (1 - ROUNDING)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["spread", "flat", "ties", "negative", "banned"])
def test_kept_sets_are_exact(kind: str, dtype: torch.dtype) -> None:
    from tests.helpers.filter_cuts import kept_by_kernel

    rows, vocab = (6, 700) if interpreted() else (120, 20_011)
    logits = torch.randn(rows, vocab) * {"flat": 0.1, "ties": 1.5}.get(kind, 3.0)
    if kind == "ties":
        logits = logits.round()
    if kind == "negative":
        logits = -logits.abs() - 0.5
    if kind == "banned":
        logits[:, torch.randperm(vocab)[: vocab - 30]] = float("-inf")
    logits = logits.to(dtype)
    top_k = torch.randint(1, 1500 if vocab > 1500 else 300, (rows,))
    top_p = torch.rand(rows, dtype=torch.float64) * 0.98 + 0.01
    top_k[::3], top_p[1::3] = -1, 1.0  # so that each is used alone and with the other
    divisor = torch.rand(rows) + 0.5
    moved = [tensor.to(triton_device()) for tensor in (logits, divisor, top_k, top_p)]
    kept = kept_by_kernel(*moved).cpu()
    for row in range(rows):
        finite = logits[row] > float("-inf")
        if kind == "banned" and top_k[row] >= int(finite.sum()):
            # Banned tokens fill up the set, and weigh nothing.
            top_k[row] = int(finite.sum())
            kept[row] &= finite
        if top_p[row] >= 1 and top_k[row] < 0:
            assert kept[row][finite].all()
            continue
        check_set(kept[row], logits[row], float(divisor[row]), int(top_k[row]), float(top_p[row]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_are_those_of_the_reference(dtype: torch.dtype) -> None:
    rows, vocab = (10, 700) if interpreted() else (2000, 5003)
    logits = (torch.randn(rows, vocab) * 2).to(dtype)
    logits[::2] = logits[::2].round()
    args = (logits, torch.rand(rows) * 1.5, *torch.randint(-(2**62), 2**62, (2, rows)))
    which = torch.arange(rows) % 5
    filters = {
        "top_k_S": torch.where((which == 0) | (which == 3), 40, -1),
        "top_p_S": torch.where((which == 1) | (which == 3), 0.83, 1.0),
        "min_p_S": torch.where((which == 2) | (which == 3), 0.07, 0.0),
    }
    want = sample(*args, **filters, backend="torch")
    moved = [tensor.to(triton_device()) for tensor in args]
    on_device = {name: value.to(triton_device()) for name, value in filters.items()}
    with poisoned_allocations():
        token, logprob = sample(*moved, **on_device, backend="triton")
    same = token.cpu() == want[0]
    assert (~same).sum() <= rows // 1000
    assert_close("logprob", logprob.cpu()[same], want[1][same], torch.float32)
    plain = sample(*moved, backend="triton")
    alone = which == 4
    assert torch.equal(token.cpu()[alone], plain[0].cpu()[alone])
    assert torch.equal(logprob.cpu()[alone], plain[1].cpu()[alone])


def test_ties_that_division_makes_are_drawn_by_id() -> None:
    """Two logits that one temperature makes equal: as in the reference, the lower id stays."""
    values = 1.5 + torch.arange(50) * 2.0**-23
    divided = values / 1.5
    first = int((divided[:-1] == divided[1:]).nonzero()[0])
    logits = torch.full((8, 300), -5.0)
    logits[:, [40, 200]] = values[first : first + 2]
    device = triton_device()
    args = (logits, torch.full((8,), 1.5), *torch.arange(16).view(2, 8))
    token, _ = sample(
        *(tensor.to(device) for tensor in args),
        top_k_S=torch.ones(8, dtype=torch.int64, device=device),
        backend="triton",
    )
    want, _ = sample(*args, top_k_S=torch.ones(8, dtype=torch.int64), backend="torch")
    assert token.tolist() == want.tolist() == [40] * 8


def test_the_likeliest_token_stays_under_the_tightest_filters() -> None:
    device = triton_device()
    logits = torch.randn(4, 600, device=device)
    token, _ = sample(
        logits,
        torch.ones(4, device=device),
        *torch.arange(8, device=device).view(2, 4),
        top_p_S=torch.tensor([1e-9, 0.0, 1.0, 1e-9], device=device),
        min_p_S=torch.tensor([0.0, 0.0, 1.0, 2.0], device=device),
        backend="triton",
    )
    assert torch.equal(token, logits.argmax(-1))


def test_rows_of_nan_end_and_harm_no_other() -> None:
    device = triton_device()
    logits = torch.randn(4, 600, device=device)
    filters = {
        "top_k_S": torch.full((4,), 20, device=device),
        "top_p_S": torch.full((4,), 0.9, device=device),
    }
    args = (torch.ones(4, device=device), *torch.arange(8, device=device).view(2, 4))
    want, _ = sample(logits, *args, **filters, backend="triton")
    logits[1], logits[2, 100:] = float("nan"), float("nan")
    token, logprob = sample(logits, *args, **filters, backend="triton")
    assert token[[0, 3]].tolist() == want[[0, 3]].tolist()
    assert ((token >= 0) & (token < 600)).all() and logprob[1].isnan()


def test_filtered_draws_can_be_captured() -> None:
    if interpreted():
        pytest.skip("a CUDA graph needs a GPU")
    logits = torch.randn(16, 5003, device="cuda", dtype=torch.bfloat16) * 2
    args = [torch.ones(16, device="cuda"), *torch.arange(32, device="cuda").view(2, 16)]
    filters = {
        "top_k_S": torch.arange(16, device="cuda"),
        "top_p_S": torch.linspace(0.2, 1.3, 16, device="cuda"),
        "min_p_S": torch.zeros(16, device="cuda"),
    }
    sample(logits, *args, **filters, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample(logits, *args, **filters, backend="triton")
    for _ in range(3):
        logits.copy_(torch.randn_like(logits))
        graph.replay()
        want = sample(logits, *args, **filters, backend="triton")
        assert torch.equal(captured[0], want[0]) and torch.equal(captured[1], want[1])
