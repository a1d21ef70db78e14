"""Draws against the exact distribution, the logprob contract, and Triton against both."""

from __future__ import annotations

import pytest
import torch

from kernels.sampling import (
    moved_logprobs,
    philox_uniform,
    sample,
    token_logprobs,
    top_logprobs,
)
from kernels.testing import assert_close, poisoned_allocations, triton_device

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.gpu)]


def device_of(backend: str) -> str:
    return "cpu" if backend == "torch" else triton_device()


def draw(backend: str, logits: torch.Tensor, temperature: float, seed: int = 11, **filters: float):
    """One draw a row with position = row."""
    device, rows = device_of(backend), logits.shape[0]
    dtypes = {"top_k_S": torch.int32, "top_p_S": torch.float32, "min_p_S": torch.float32}
    return sample(
        logits.to(device),
        torch.full((rows,), temperature, device=device),
        torch.full((rows,), seed, device=device),
        torch.arange(rows, device=device),
        **{
            name: torch.full((rows,), value, dtype=dtypes[name], device=device)
            for name, value in filters.items()
        },
        backend=backend,
    )


def chi_square(tokens: torch.Tensor, probs: torch.Tensor) -> float:
    counts = torch.bincount(tokens.cpu(), minlength=probs.numel()).double()
    expected = probs.double() * counts.sum()
    assert counts[expected == 0].sum() == 0, "a token of probability zero was drawn"
    rare = (expected > 0) & (expected < 5)
    counts = torch.cat((counts[expected >= 5], counts[rare].sum()[None]))
    expected = torch.cat((expected[expected >= 5], expected[rare].sum()[None] + 1e-12))
    degrees = max(len(expected) - 1, 1)
    score = float(((counts - expected).square() / expected).sum())
    return (score - degrees) / (2 * degrees) ** 0.5  # about standard normal


def num_draws(backend: str, *, interpreted: int) -> int:
    return interpreted if backend == "triton" and triton_device() == "cpu" else 20000


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_draws_follow_the_distribution(backend: str, temperature: float) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 2
    logits[[3, 20]] = float("-inf")
    tokens, _ = draw(backend, logits.expand(num_draws(backend, interpreted=1500), -1), temperature)
    assert abs(chi_square(tokens, (logits / temperature).softmax(-1))) < 4.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "filters",
    [{"top_k_S": 7}, {"top_p_S": 0.8}, {"min_p_S": 0.1}, {"top_k_S": 12, "top_p_S": 0.9}],
)
def test_filtered_draws_follow_the_renormalised_distribution(
    backend: str, filters: dict[str, float]
) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(2))
    order = logits.argsort(descending=True)
    probs = logits.double().softmax(-1)
    ranked = probs[order]
    if "top_k_S" in filters:
        ranked[int(filters["top_k_S"]) :] = 0
        ranked /= ranked.sum()
    if "top_p_S" in filters:
        ranked[ranked.cumsum(0) - ranked >= filters["top_p_S"]] = 0
    if "min_p_S" in filters:
        ranked[ranked < filters["min_p_S"] * ranked[0]] = 0
    want = torch.zeros_like(probs)
    want[order] = ranked / ranked.sum()
    batch = logits.expand(num_draws(backend, interpreted=40), -1)
    tokens, logprobs = draw(backend, batch, 1.0, **filters)
    assert abs(chi_square(tokens, want)) < 4.5
    full = probs.log().float()
    assert_close("logprob", logprobs.cpu(), full[tokens.cpu()], torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 63, 256, 3001])
def test_draw_is_the_inverse_cdf_of_the_philox_uniform(
    vocab: int, dtype: torch.dtype, backend: str
) -> None:
    logits = (torch.randn(40, vocab) * 3).to(dtype)
    temperature = 0.7
    tokens, logprobs = draw(backend, logits, temperature, seed=5)
    tokens, logprobs = tokens.cpu(), logprobs.cpu()
    scaled = logits.double() / temperature
    uniform = philox_uniform(torch.full((40,), 5), torch.arange(40))
    after = scaled.softmax(-1).cumsum(-1).gather(1, tokens[:, None]).squeeze(1)
    width = scaled.softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    assert (uniform < after + 1e-6).all() and (uniform > after - width - 1e-6).all()
    want = scaled.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1).float()
    assert_close("logprob", logprobs, want, torch.float32)
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.0, 1e-7])
def test_greedy_takes_the_first_of_the_largest(temperature: float, backend: str) -> None:
    logits = torch.zeros(3, 700)
    logits[0, [300, 600]] = 5.0
    logits[1, [699]] = 1.0
    filters = {"top_k_S": 2, "top_p_S": 0.5}
    tokens, logprobs = draw(backend, logits, temperature, **filters)
    assert tokens.tolist() == [300, 699, 0]
    want = logits.log_softmax(-1).gather(1, tokens.cpu()[:, None]).squeeze(1)
    assert_close("logprob", logprobs.cpu(), want, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_draw_depends_on_its_own_row_only(backend: str) -> None:
    device = device_of(backend)
    logits = torch.randn(12, 1000).to(device)
    temperature = torch.tensor([0.0, 0.5, 1.0, 2.0] * 3, device=device)
    seed, position = torch.arange(12, device=device) - 6, torch.arange(12, device=device) * 10
    top_k = torch.tensor([0, 0, 50] * 4, device=device)
    together = sample(logits, temperature, seed, position, top_k_S=top_k, backend=backend)
    for row in range(12):
        one = slice(row, row + 1)
        filters = {"top_k_S": top_k[one]} if top_k[row] else {}
        alone = sample(
            logits[one], temperature[one], seed[one], position[one], **filters, backend=backend
        )
        assert torch.equal(alone[0], together[0][one]) and torch.equal(alone[1], together[1][one])


@pytest.mark.parametrize("backend", BACKENDS)
def test_banned_tokens_are_never_drawn(backend: str) -> None:
    """Whole chunks banned, the first and last tokens too."""
    logits = torch.full((100, 1000), float("-inf"))
    logits[:, [301, 302, 900]] = torch.tensor([0.0, -30.0, 1.0])
    tokens, _ = draw(backend, logits, 1.0)
    assert set(tokens.tolist()) == {301, 900}
    one = torch.full((100, 1000), float("-inf"))
    one[:, 517] = -4.0
    tokens, logprobs = draw(backend, one, 1.0, top_p_S=0.9)
    assert (tokens == 517).all() and (logprobs == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_nan_raises_nothing_and_harms_no_other(backend: str) -> None:
    logits = torch.randn(3, 300)
    want, _ = draw(backend, logits, 1.0)
    logits[1] = float("nan")
    tokens, logprobs = draw(backend, logits, 1.0)
    assert tokens[[0, 2]].tolist() == want[[0, 2]].tolist()
    assert 0 <= int(tokens[1]) < 300 and logprobs[1].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "filters", [{}, {"top_k_S": 1}, {"top_k_S": 20, "top_p_S": 0.9}, {"min_p_S": 0.1}]
)
def test_every_row_that_is_not_finite_says_so_by_its_logprob(backend, temperature, filters) -> None:
    """One NaN or +inf among many logits, at any place, beside tokens that are banned."""
    torch.manual_seed(0)
    vocab, nan, inf = 1100, float("nan"), float("inf")
    good = torch.randn(1, vocab)
    good[0, 300:600] = -inf
    rows = [good]
    for value in (nan, inf):
        for at in (0, 255, 256, 700, vocab - 1):
            rows.append(good.clone())
            rows[-1][0, at] = value
        rows.append(torch.full((1, vocab), value))
    rows += [torch.full((1, vocab), -inf), good]
    half_nan = good.clone()
    half_nan[0, 256:512] = nan
    logits = torch.cat([*rows, half_nan])
    tokens, logprobs = draw(backend, logits, temperature, **filters)
    finite = logprobs.isfinite().tolist()
    assert finite == [True, *[False] * (len(rows) - 2), True, False]
    assert ((tokens >= 0) & (tokens < vocab)).all()
    places = [0, len(rows) - 1]
    alone = [draw(backend, good.expand(place + 1, -1), temperature, **filters) for place in places]
    for place, (token, logprob) in zip(places, alone, strict=True):
        assert tokens[place] == token[place] and logprobs[place] == logprob[place]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str) -> None:
    tokens, logprobs = draw(backend, torch.empty(0, 50), 1.0)
    assert tokens.shape == logprobs.shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_triton_draws_what_the_reference_draws(dtype: torch.dtype) -> None:
    rows = 16 if triton_device() == "cpu" else 256
    logits = (torch.randn(rows, 5003) * 3).to(dtype)
    temperature = torch.rand(rows) * 1.5
    temperature[::5] = 0.0
    seed, position = torch.randint(-(2**62), 2**62, (2, rows))
    top_p = torch.where(torch.arange(rows) % 3 == 0, 0.8, 1.0)
    for filters in ({}, {"top_p_S": top_p}):
        args = (logits, temperature, seed, position)
        want = sample(*args, **filters, backend="torch")
        moved = [tensor.to(triton_device()) for tensor in args]
        on_device = {name: value.to(triton_device()) for name, value in filters.items()}
        with poisoned_allocations():
            tokens, logprobs = sample(*moved, **on_device, backend="triton")
        same = tokens.cpu() == want[0]
        # A uniform within rounding of a boundary may fall to the neighbour.
        assert (~same).sum() <= rows // 100
        assert_close("logprob", logprobs.cpu()[same], want[1][same], torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 1e-5, 0.05, 1.0, 3.0, 1e6])
def test_logprob_against_float64(temperature: float, dtype: torch.dtype) -> None:
    """A whole vocabulary, rows from flat to certain, half of it banned in every other row."""
    rows, vocab = (2, 3001) if triton_device() == "cpu" else (24, 151_936)
    logits = torch.randn(rows, vocab) * torch.logspace(-2, 1.5, rows)[:, None]
    logits[::2, torch.randperm(vocab)[: vocab // 2]] = float("-inf")
    logits = logits.to(dtype)
    tokens, logprobs = draw("triton", logits, temperature)
    scaled = logits.double() / (temperature or 1.0)
    want = scaled.log_softmax(-1).gather(1, tokens.cpu()[:, None]).squeeze(1)
    assert want.isfinite().all()
    assert_close("logprob", logprobs.cpu(), want.float(), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
def test_a_logprob_follows_from_that_of_another_token(
    dtype: torch.dtype, temperature: float
) -> None:
    logits = (4 * torch.randn(50, 300, generator=torch.Generator().manual_seed(2))).to(dtype)
    known, logprob = draw("torch", logits, temperature)
    rows = torch.tensor([3, 0, 49, 20])
    wanted = torch.tensor([7, 299, 0, int(known[20])])
    scale = torch.full((4,), temperature)
    got = moved_logprobs(logits, rows, scale, wanted, known_M=known[rows], logprob_M=logprob[rows])
    assert got.dtype == torch.float32
    want = token_logprobs(logits[rows], wanted, scale)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    assert got[3] == logprob[20]


def test_a_moved_logprob_is_finite_unless_its_row_is_not() -> None:
    logits = torch.zeros(3, 4)
    logits[0, 1], logits[1, 1] = float("-inf"), -3e38
    one = torch.ones(3, dtype=torch.int64)
    known = torch.zeros(3, dtype=torch.int64)
    logprob = torch.tensor([-1.0, -1.0, float("nan")])
    scale = torch.full((3,), 0.5)
    rows = torch.arange(3)
    got = moved_logprobs(logits, rows, scale, one, known_M=known, logprob_M=logprob)
    assert got[:2].tolist() == [torch.finfo(torch.float32).min] * 2
    assert got[2].isnan()


def test_token_and_top_logprobs() -> None:
    logits = (torch.randn(9, 300) * 3).bfloat16()
    temperature = torch.tensor([0.0, 0.5, 1.0] * 3)
    scaled = logits.double() / torch.tensor([1.0, 0.5, 1.0] * 3, dtype=torch.float64)[:, None]
    want = scaled.log_softmax(-1).float()
    token = torch.randint(0, 300, (9,), dtype=torch.int32)
    got = token_logprobs(logits, token, temperature)
    assert_close("token", got, want[torch.arange(9), token.long()], torch.float32)
    ids, values = top_logprobs(logits, temperature, 5)
    assert ids.dtype == torch.int32
    assert_close("top", values, want.topk(5).values, torch.float32)
    assert_close("ids", values, want.gather(1, ids.long()), torch.float32)
