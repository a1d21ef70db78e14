"""Drawing tokens and their logprobs, with counter-based random numbers.

Shapes: S rows, V vocabulary, k likeliest tokens asked for.

A draw is a pure function of (logits, temperature, filters, seed, position): no generator
has state, so a token does not depend on the batch it was sampled in. Philox4x32-10
(Salmon et al., 2011) gives one uniform per (seed, position), and the inverse of the
cumulative distribution in vocabulary order turns it into a token.
"""

from __future__ import annotations

import torch

from kernels.backend import KernelBackend, unknown_backend
from kernels.sampling import reference
from kernels.sampling.logprobs import (
    moved_logprobs,
    named_logprobs,
    token_logprobs,
    top_logprobs,
)
from kernels.sampling.masks import TokenMasks
from kernels.sampling.philox import philox_uniform

__all__ = [
    "TokenMasks",
    "moved_logprobs",
    "named_logprobs",
    "philox_uniform",
    "sample",
    "token_logprobs",
    "top_logprobs",
]


def sample(
    logits_SV: torch.Tensor,
    temperature_S: torch.Tensor,
    seed_S: torch.Tensor,
    position_S: torch.Tensor,
    *,
    top_k_S: torch.Tensor | None = None,
    top_p_S: torch.Tensor | None = None,
    min_p_S: torch.Tensor | None = None,
    entropy_S: torch.Tensor | None = None,
    masks: TokenMasks | None = None,
    backend: KernelBackend,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row; returns (token_S int64, logprob_S float32).

    logits_SV: float32, bfloat16 or float16; -inf bans a token. Every row needs a finite
    largest logit and no NaN. Any other row (a NaN or +inf anywhere, or only -inf) gives a
    logprob that is not finite and some valid id, whatever the temperature and the filters,
    and no error, since looking would stall a GPU: the caller looks at the logprobs.
    temperature_S: float32; below 1e-6 the row is greedy: the first of the largest logits,
    with its logprob at temperature 1.
    seed_S, position_S: int64, any value; equal pairs draw from the same uniform.
    top_k_S (int, off when <= 0), top_p_S (float, off when >= 1), min_p_S (float, off when
    <= 0) restrict what may be drawn; see `kernels.sampling.filters`. Pass None where no row uses a
    filter: a tensor costs another kernel (and, by the torch back end, a look at its
    values on the host).
    entropy_S: float32 [S], contiguous, filled in place if given: entropy in nats of
    softmax(logits / temperature) over the whole vocabulary, at temperature 1 in greedy rows.
    masks: which tokens may be drawn in some rows, none of which has a filter (what a row with both
    is given says nothing). A row with a mask is drawn by the law over what that allows, however
    unlikely all of it is, and its logprob is at least the lowest float32. A mask that allows
    nothing gives some valid id. Rows without one get what they get without `masks`.

    The logprob is log_softmax(logits / temperature)[token] in float32 over the whole
    vocabulary, whatever the filters and masks. A token of probability 0, banned or filtered is
    never drawn. Raises ValueError on an unknown backend, and on masks of a wrong shape or dtype.
    """
    filters = (top_k_S, top_p_S, min_p_S)
    rows = (logits_SV, temperature_S, seed_S, position_S)
    if masks is not None:
        masks.check(logits_SV)
    if backend == "torch":
        return reference.sample(*rows, filters, entropy_S, masks)
    if backend == "triton":
        from kernels.sampling import triton

        return triton.sample(*rows, filters, entropy_S, masks)
    raise unknown_backend(backend)
