"""Sampling on a GPU against float64 and against the torch reference, before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kernels.sampling import sample

Check = Callable[[], str]

VOCAB = 151_936
TOLERANCE = 2e-5
"""Of a logprob or an entropy, absolute and relative: 2 units in the last place near 100."""


def checks() -> Iterator[tuple[str, Check]]:
    """Name and call of each; a call raises AssertionError or says what it found."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield f"logprob and entropy against float64, {dtype}", lambda d=dtype: _against_double(d)
        for spread in (1.0, 4.0):
            yield (
                f"filtered tokens against the reference, {dtype}, spread {spread}",
                lambda d=dtype, s=spread: _against_reference(d, s),
            )
    yield "a row alone, in a batch and in a graph", _alone_and_captured


def _against_double(dtype: torch.dtype) -> str:
    rows = 32
    logits = torch.randn(rows, VOCAB, device="cuda") * torch.logspace(-2, 1.5, rows).cuda()[:, None]
    logits[::4, torch.randperm(VOCAB, device="cuda")[: VOCAB // 2]] = float("-inf")
    logits = logits.to(dtype)
    temperature = torch.tensor([0.0, 1e-3, 0.05, 0.7, 1.0, 1.3, 50.0, 1e6] * 4, device="cuda")
    entropy = torch.empty(rows, device="cuda")
    seed, position = torch.randint(2**62, (2, rows), device="cuda")
    token, logprob = sample(
        logits, temperature, seed, position, entropy_S=entropy, backend="triton"
    )
    divisor = torch.where(temperature < 1e-6, 1.0, temperature).double()
    exact = (logits.double() / divisor[:, None]).log_softmax(-1)
    want = exact.gather(1, token[:, None]).squeeze(1)
    want_entropy = torch.special.entr(exact.exp()).sum(-1)
    found = [_worst("logprob", logprob, want), _worst("entropy", entropy, want_entropy)]
    return ", ".join(found)


def _worst(name: str, got: torch.Tensor, want: torch.Tensor) -> str:
    error = (got.double() - want).abs()
    bound = TOLERANCE * (1 + want.abs())
    at = int((error / bound).argmax())
    assert bool((error <= bound).all()), f"{name} of row {at}: {got[at]:.9g}, not {want[at]:.9g}"
    return f"{name} off by at most {float(error.max()):.1e}"


def _against_reference(dtype: torch.dtype, spread: float) -> str:
    rows, same, total = 256, 0, 0
    logits = (torch.randn(rows, VOCAB, device="cuda") * spread).to(dtype)
    temperature = torch.rand(rows, device="cuda") + 0.5
    mixed = torch.arange(rows, device="cuda") % 4
    filters = {
        "top_k_S": torch.where(mixed == 1, 50, torch.where(mixed == 3, 2000, -1)),
        "top_p_S": torch.where(mixed >= 2, 0.95, 1.0),
        "min_p_S": torch.where(mixed == 0, 0.05, 0.0),
    }
    for _ in range(4):
        rows_args = (logits, temperature, *torch.randint(2**62, (2, rows), device="cuda"))
        want = sample(*rows_args, **filters, backend="torch")
        got = sample(*rows_args, **filters, backend="triton")
        equal = got[0] == want[0]
        assert torch.allclose(got[1][equal], want[1][equal], rtol=TOLERANCE, atol=TOLERANCE)
        same, total = same + int(equal.sum()), total + rows
    assert same >= 0.998 * total, f"only {same} of {total} tokens are those of the reference"
    return f"{same} of {total} tokens are those of the reference"


def _alone_and_captured() -> str:
    rows = 64
    logits = torch.randn(rows, VOCAB, device="cuda", dtype=torch.bfloat16) * 3
    args = [torch.ones(rows, device="cuda"), *torch.randint(2**62, (2, rows), device="cuda")]
    filters = {
        "top_k_S": torch.arange(rows, device="cuda") % 3 * 20,
        "top_p_S": 1 - torch.arange(rows, device="cuda") % 5 * 0.1,
        "min_p_S": torch.zeros(rows, device="cuda"),
    }
    together = sample(logits, *args, **filters, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample(logits, *args, **filters, backend="triton")
    graph.replay()
    for got, want in zip(captured, together, strict=True):
        assert torch.equal(got, want), "a replay differs from the plain launch"
    for row in range(rows):
        one = slice(row, row + 1)
        picked = {name: value[one] for name, value in filters.items()}
        alone = sample(logits[one], *(x[one] for x in args), **picked, backend="triton")
        for got, want in zip(alone, together, strict=True):
            assert torch.equal(got, want[one]), f"row {row} alone differs"
    return f"{rows} rows bit-equal"
