"""Entropies against float64, and what asking for them must not change."""

from __future__ import annotations

import pytest
import torch

from kernels.sampling import sample
from kernels.testing import assert_close, poisoned_allocations, triton_device

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.gpu)]


def draw(backend: str, logits: torch.Tensor, temperature: torch.Tensor, *, entropy: bool = True):
    """(token, logprob, entropy) of one draw a row, on the CPU."""
    device, rows = "cpu" if backend == "torch" else triton_device(), len(logits)
    out = torch.full((rows,), float("nan"), device=device) if entropy else None
    seed, position = torch.arange(2 * rows, device=device).view(2, rows)
    with poisoned_allocations():
        token, logprob = sample(
            logits.to(device),
            temperature.to(device),
            seed,
            position,
            entropy_S=out,
            backend=backend,
        )
    return token.cpu(), logprob.cpu(), None if out is None else out.cpu()


def exact(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    divisor = torch.where(temperature < 1e-6, 1.0, temperature).double()
    return torch.special.entr((logits.double() / divisor[:, None]).softmax(-1)).sum(-1).float()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 63, 256, 3001])
def test_entropy_is_that_of_the_tempered_distribution(
    vocab: int, dtype: torch.dtype, backend: str
) -> None:
    logits = (torch.randn(8, vocab) * torch.tensor([[0.1], [1.0], [4.0], [30.0]] * 2)).to(dtype)
    temperature = torch.tensor([1.0, 0.7, 0.0, 1e-3, 1.5, 1e-7, 40.0, 1e30])
    _, _, entropy = draw(backend, logits, temperature)
    assert entropy is not None
    assert_close("entropy", entropy, exact(logits, temperature), torch.float32)
    assert (entropy >= 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_banned_tokens_add_nothing(backend: str) -> None:
    """Whole chunks of them, and a row with one token left."""
    logits = torch.full((3, 1000), float("-inf"))
    logits[0, [301, 302, 900]] = torch.tensor([0.5, -3.0, 1.0])
    logits[1, 517] = -40.0
    logits[2, 256:512] = 7.0
    _, _, entropy = draw(backend, logits, torch.ones(3))
    assert entropy is not None
    assert_close("entropy", entropy, exact(logits, torch.ones(3)), torch.float32)
    assert entropy[1] == 0 and entropy[2] == pytest.approx(torch.tensor(256.0).log().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_and_logprobs_are_the_same_with_and_without(backend: str) -> None:
    logits, temperature = torch.randn(6, 900) * 2, torch.tensor([1.0, 0.0, 0.5] * 2)
    token, logprob, _ = draw(backend, logits, temperature)
    plain_token, plain_logprob, none = draw(backend, logits, temperature, entropy=False)
    assert none is None
    assert torch.equal(token, plain_token) and torch.equal(logprob, plain_logprob)
