"""Draws among the tokens that a mask allows, in plain torch on a CPU: the vocabulary is
exponentiated once, for the draw and for the logprob, which is that of the whole law.

Shapes: S rows, V vocabulary, W = V padded to whole chunks, N chunks.
"""

from __future__ import annotations

import numpy as np
import torch

from kernels.sampling.philox import philox_uniform
from kernels.sampling.reference import (
    CHUNK,
    entropy,
    exp_weights,
    inverse_cdf,
    split_temperature,
)

_LEAST = 1e-20
"""Weight of all that may come, where the likeliest token's is 1, below which float32 has too few
digits left for those that are less likely still."""


def sample_allowed(
    logits_SV: torch.Tensor,
    temperature_S: torch.Tensor,
    seed_S: torch.Tensor,
    position_S: torch.Tensor,
    allowed_SV: torch.Tensor,
    entropy_S: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw one token a row among those that `allowed_SV` (bool) names, without filters; returns
    token_S int64, logprob_S float32 and settled_S bool.

    Arguments, logprobs and entropies as of `kernels.sampling.sample`: of the whole law, whatever is
    allowed. The token is drawn by the law over what is allowed. A row that is not settled was not
    drawn, and whatever stands there says nothing: all that it allows is far less likely than what
    it does not, or its logits are not finite. Every row is on the CPU.
    """
    greedy_S, divisor_S = split_temperature(temperature_S)
    weights_SW, max_S = exp_weights(logits_SV, divisor_S)
    total_S = weights_SW.unflatten(1, (-1, CHUNK)).sum(-1).double().sum(-1)
    if entropy_S is not None:
        entropy_S.copy_(entropy(weights_SW, total_S))
    inside = weights_SW[:, : logits_SV.shape[1]].numpy()
    # numpy takes booleans for numbers, of which torch would make a copy first.
    np.multiply(inside, allowed_SV.numpy(), out=inside)
    chunk_sum_SN = weights_SW.unflatten(1, (-1, CHUNK)).sum(-1)
    token_S = inverse_cdf(weights_SW, chunk_sum_SN, philox_uniform(seed_S, position_S))
    rows_G = greedy_S.nonzero().squeeze(1)
    if len(rows_G):
        banned_GV = ~allowed_SV[rows_G]
        token_S[rows_G] = logits_SV[rows_G].masked_fill(banned_GV, float("-inf")).argmax(-1)
    chosen_S = logits_SV.gather(1, token_S.unsqueeze(1)).squeeze(1).double()
    logprob_S = ((chosen_S - max_S.double()) / divisor_S.double() - total_S.log()).float()
    settled_S = (chunk_sum_SN.double().sum(-1) > _LEAST) & logprob_S.isfinite()
    return token_S, logprob_S, settled_S
