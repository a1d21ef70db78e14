"""Rows with a mask: tokens by the law over what it allows, numbers of the whole law, and every
other row as if there were no masks."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.sampling import TokenMasks, sample
from kernels.sampling.masks import banned_tokens, lowest_logit, restrict_
from kernels.testing import poisoned_allocations, triton_device

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.gpu)]
VOCAB = 1003
ROWS = 12
LOWEST = torch.finfo(torch.float32).min


def device_of(backend: str) -> str:
    return "cpu" if backend == "torch" else triton_device()


def bits_of(allowed_MV: torch.Tensor) -> torch.Tensor:
    """Booleans as `TokenMasks.bits_MB`, with all bits beyond the vocabulary set."""
    num_masks, vocab = allowed_MV.shape
    wide = torch.ones(num_masks, -(-vocab // 32) * 32, dtype=torch.int64)
    wide[:, :vocab] = allowed_MV
    words = (wide.unflatten(1, (-1, 32)) << torch.arange(32)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def masks_of(mask_S: list[int], allowed_MV: torch.Tensor, device: str) -> TokenMasks:
    index = torch.tensor(mask_S, dtype=torch.int32, device=device)
    return TokenMasks(bits_of(allowed_MV).to(device), index)


def rows_on(device: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Logits, temperatures, seeds and positions."""
    generator = torch.Generator().manual_seed(4)
    logits = (3 * torch.randn(ROWS, VOCAB, generator=generator)).to(dtype)
    temperature = torch.tensor([0.0, 0.4, 1.0, 1.6]).repeat(ROWS // 4)
    rows = logits, temperature, torch.arange(ROWS), 5 * torch.arange(ROWS)
    return tuple(part.to(device) for part in rows)


def some_allowed(num_masks: int, share: float = 0.1) -> torch.Tensor:
    allowed = torch.rand(num_masks, VOCAB, generator=torch.Generator().manual_seed(6)) < share
    # Whole chunks that nothing of may come, and masks of one token.
    allowed[:, 256:512] = False
    allowed[::5] = False
    allowed[::5, VOCAB - 1] = True
    return allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_are_of_the_masked_law_and_numbers_of_the_whole(
    backend: str, dtype: torch.dtype
) -> None:
    device = device_of(backend)
    rows = rows_on(device, dtype)
    allowed = some_allowed(ROWS)
    index = [row if row % 3 else -1 for row in range(ROWS)]
    entropy, plain_entropy = torch.empty(2, ROWS, device=device)
    masks = masks_of(index, allowed, device)
    with poisoned_allocations():
        token, logprob = sample(*rows, entropy_S=entropy, masks=masks, backend=backend)
    plain = sample(*rows, entropy_S=plain_entropy, backend=backend)
    law = restrict_(rows[0].clone(), masks.bits_MB)
    restricted, _ = sample(law, *rows[1:], backend=backend)
    assert torch.equal(entropy, plain_entropy)
    divisor = torch.where(rows[1] < 1e-6, 1.0, rows[1]).double()
    whole = (rows[0].double() / divisor[:, None]).log_softmax(-1)
    for row in range(ROWS):
        if index[row] < 0:
            assert (token[row], logprob[row]) == (plain[0][row], plain[1][row])
            continue
        assert bool(allowed[row, token[row]])
        assert token[row] == restricted[row]
        assert float(logprob[row]) == pytest.approx(float(whole[row, token[row]]), abs=3e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_that_allows_all_changes_nothing(backend: str) -> None:
    rows = rows_on(device_of(backend))
    every = torch.ones(1, VOCAB, dtype=torch.bool)
    masks = masks_of([0] * ROWS, every, device_of(backend))
    plain = sample(*rows, backend=backend)
    for got, want in zip(sample(*rows, masks=masks, backend=backend), plain, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_share_masks_and_depend_on_nothing_else(backend: str) -> None:
    device = device_of(backend)
    rows, allowed = rows_on(device), some_allowed(3)
    index = [2, 1, -1, 0] * (ROWS // 4)
    entropy, own_entropy = torch.empty(ROWS, device=device), torch.empty(1, device=device)
    together = sample(
        *rows, entropy_S=entropy, masks=masks_of(index, allowed, device), backend=backend
    )
    for row in range(0, ROWS, 3):
        own = [part[row : row + 1] for part in rows]
        masks = masks_of([min(index[row], 0)], allowed[[index[row]]], device)
        token, logprob = sample(*own, entropy_S=own_entropy, masks=masks, backend=backend)
        found = (token, logprob, own_entropy)
        for one, all_rows in zip(found, (*together, entropy), strict=True):
            assert one[0] == all_rows[row]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low", [-200.0, -1e9, -3e38, float("-inf")])
def test_what_is_allowed_comes_however_unlikely_it_is(
    low: float, dtype: torch.dtype, backend: str
) -> None:
    logits, temperature, seed, position = rows_on(device_of(backend), dtype)
    logits[:, [300, 301]] = low
    logits[:, 301] *= 0.5
    allowed = torch.zeros(1, VOCAB, dtype=torch.bool)
    allowed[0, [300, 301]] = True
    masks = masks_of([0] * ROWS, allowed, device_of(backend))
    token, logprob = sample(logits, temperature, seed, position, masks=masks, backend=backend)
    assert set(token.tolist()) <= {300, 301}
    assert bool((logprob >= LOWEST).all()) and bool((logprob < -50).all())
    if low == -math.inf:
        assert set(logprob.tolist()) == {LOWEST}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_is_not_finite_says_so_wherever_its_mask_looks(backend: str) -> None:
    device = device_of(backend)
    nan, inf = float("nan"), float("inf")
    good = rows_on("cpu")[0][0]
    rows = [good]
    for value in (nan, inf):
        for at in (3, 255, 256, VOCAB - 1):
            rows.append(good.clone())
            rows[-1][at] = value
        rows.append(torch.full((VOCAB,), value))
    rows += [torch.full((VOCAB,), -inf), good]
    logits = torch.stack(rows).to(device)
    size = len(rows)
    # Of places that are broken in some rows, and of others.
    allowed = torch.zeros(2, VOCAB, dtype=torch.bool)
    allowed[0, [3, 255, 256, VOCAB - 1]] = True
    allowed[1, [40, 700]] = True
    seed = torch.arange(size, device=device)
    for scale in (0.0, 0.5, 1.0):
        temperature = torch.full((size,), scale, device=device)
        for mask in (0, 1):
            masks = masks_of([mask] * size, allowed, device)
            token, logprob = sample(logits, temperature, seed, seed, masks=masks, backend=backend)
            assert logprob.isfinite().tolist() == [True, *[False] * (size - 2), True]
            assert bool(((token >= 0) & (token < VOCAB)).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_that_allows_nothing_gives_some_token_and_harms_no_other(backend: str) -> None:
    device = device_of(backend)
    rows, allowed = rows_on(device), some_allowed(ROWS)
    index = list(range(ROWS))
    want = sample(*rows, masks=masks_of(index, allowed, device), backend=backend)
    allowed[1] = allowed[4] = False
    token, logprob = sample(*rows, masks=masks_of(index, allowed, device), backend=backend)
    assert bool(((token >= 0) & (token < VOCAB)).all())
    others = [row for row in range(ROWS) if row not in (1, 4)]
    assert torch.equal(token[others], want[0][others])
    assert torch.equal(logprob[others], want[1][others])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_with_filters_stand_beside_rows_with_masks(backend: str) -> None:
    device = device_of(backend)
    rows, allowed = rows_on(device), some_allowed(ROWS)
    masked = [row for row in range(ROWS) if row % 2]
    index = [row if row % 2 else -1 for row in range(ROWS)]
    top_k = torch.tensor([-1 if row % 2 else 5 for row in range(ROWS)], device=device)
    masks = masks_of(index, allowed, device)
    token, logprob = sample(*rows, top_k_S=top_k, masks=masks, backend=backend)
    alone = sample(*rows, masks=masks, backend=backend)
    filtered = sample(*rows, top_k_S=top_k, backend=backend)
    for got, of_masks, of_filters in zip((token, logprob), alone, filtered, strict=True):
        assert torch.equal(got[masked], of_masks[masked])
        assert torch.equal(got[::2], of_filters[::2])


@pytest.mark.gpu
def test_triton_draws_what_the_reference_draws() -> None:
    allowed, index = some_allowed(ROWS, 0.5), [row if row % 4 else -1 for row in range(ROWS)]
    want = sample(*rows_on("cpu"), masks=masks_of(index, allowed, "cpu"), backend="torch")
    device = triton_device()
    # Rows that do not lie behind one another, as a part of wider logits.
    logits, *others = rows_on(device)
    wide = torch.zeros(ROWS, VOCAB + 13, device=device)
    wide[:, :VOCAB] = logits
    masks = masks_of(index, allowed, device)
    token, logprob = sample(wide[:, :VOCAB], *others, masks=masks, backend="triton")
    assert token.tolist() == want[0].tolist()
    torch.testing.assert_close(logprob.cpu(), want[1], atol=2e-5, rtol=0)


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 255, 256, 257])
def test_every_bit_is_of_its_token(vocab: int) -> None:
    allowed = torch.rand(20, vocab, generator=torch.Generator().manual_seed(vocab)) < 0.4
    assert torch.equal(banned_tokens(bits_of(allowed), vocab), ~allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_least_that_an_allowed_logit_counts_as_is_of_its_dtype(dtype: torch.dtype) -> None:
    lowest = lowest_logit(dtype)
    assert float(torch.tensor(lowest, dtype=dtype)) == lowest
    found = restrict_(torch.full((1, 2), -math.inf, dtype=dtype), torch.tensor([[1]]).int())
    assert found.tolist() == [[lowest, -math.inf]]


def test_masks_that_do_not_fit_are_refused() -> None:
    rows, bits = rows_on("cpu"), bits_of(some_allowed(2))
    index = torch.zeros(ROWS, dtype=torch.int32)
    wrong = [
        TokenMasks(bits[:, :-1].contiguous(), index),
        TokenMasks(bits[:, :-1], index),
        TokenMasks(bits.long(), index),
        TokenMasks(bits, index[1:]),
        TokenMasks(bits, index.long()),
    ]
    for masks in wrong:
        with pytest.raises(ValueError, match=r"bits_MB|mask_S"):
            sample(*rows, masks=masks, backend="torch")
