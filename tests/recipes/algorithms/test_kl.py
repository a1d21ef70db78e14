"""KL estimators against the exact KL of two categorical distributions."""

from __future__ import annotations

import pytest
import torch

from recipes.algorithms.kl import kl


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(0)
    q = (p + 0.1 * torch.randn(7, generator=generator, dtype=torch.float64)).log_softmax(0)
    return p, q


def test_k1_and_k3_are_unbiased() -> None:
    p, q = distributions()
    exact = (p.exp() * (p - q)).sum()
    for name in ("k1", "k3"):
        expectation = (p.exp() * kl(p, q, name)).sum()  # type: ignore[arg-type]
        torch.testing.assert_close(expectation, exact)


def test_k3_is_never_negative_and_k1_is() -> None:
    p, q = distributions()
    assert (kl(p, q, "k3") >= 0).all()
    assert (kl(p, q, "k1") < 0).any()


def test_k2_has_the_gradient_of_the_kl() -> None:
    logits, (_, q) = torch.zeros(7, dtype=torch.float64, requires_grad=True), distributions()
    p = logits.log_softmax(0)
    expectation = (p.exp().detach() * kl(p, q, "k2")).sum()
    (surrogate,) = torch.autograd.grad(expectation, logits, retain_graph=True)
    (exact,) = torch.autograd.grad((p.exp() * (p - q)).sum(), logits)
    torch.testing.assert_close(surrogate, exact)


def test_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="k4"):
        kl(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]
