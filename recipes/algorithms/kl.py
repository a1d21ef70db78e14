"""Estimators of KL(policy || other) from tokens that the policy sampled.

J. Schulman, "Approximating KL divergence" (2020). All take log-probabilities of the sampled
tokens, float of any one shape, and return the same shape.
"""

from __future__ import annotations

from typing import Literal

import torch

KLEstimator = Literal["k1", "k2", "k3"]


def k1(logprobs: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """log p - log q: unbiased, high variance, negative on some tokens."""
    return logprobs - other


def k2(logprobs: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(log p - log q)^2 / 2: biased, low variance; its gradient is the gradient of the KL."""
    return 0.5 * (logprobs - other).square()


def k3(logprobs: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """q / p - 1 - log(q / p): unbiased, never negative; the one GRPO uses."""
    log_ratio = other - logprobs
    return torch.expm1(log_ratio) - log_ratio


def kl(logprobs: torch.Tensor, other: torch.Tensor, estimator: KLEstimator) -> torch.Tensor:
    """The named estimator of KL(policy || other), token by token; float [K], [K] -> [K].

    Raises ValueError for another name.
    """
    if estimator == "k1":
        return k1(logprobs, other)
    if estimator == "k2":
        return k2(logprobs, other)
    if estimator == "k3":
        return k3(logprobs, other)
    raise ValueError(f"unknown KL estimator {estimator!r}")
