"""Sampling in plain torch; it also runs in production on CPU.

Shapes: S rows, V vocabulary, W = V padded to whole chunks, N chunks, F rows with a filter, M rows
with a mask.

The search for the drawn token has two levels, chunk then token, so that the vocabulary is
exponentiated once and scanned never: only N chunk sums and one chunk a row are accumulated.
"""

from __future__ import annotations

import torch

from kernels.sampling.filters import Filters, filtered_rows, keep_mask
from kernels.sampling.masks import TokenMasks, restrict_
from kernels.sampling.philox import philox_uniform

CHUNK = 256
GREEDY_BELOW = 1e-6


def sample(
    logits_SV: torch.Tensor,
    temperature_S: torch.Tensor,
    seed_S: torch.Tensor,
    position_S: torch.Tensor,
    filters: Filters,
    entropy_S: torch.Tensor | None = None,
    masks: TokenMasks | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.sampling.sample`."""
    greedy_S, divisor_S = split_temperature(temperature_S)
    uniform_S = philox_uniform(seed_S, position_S)
    weights_SW, max_S = exp_weights(logits_SV, divisor_S)
    chunk_sum_SN = weights_SW.unflatten(1, (-1, CHUNK)).sum(-1)
    token_S = inverse_cdf(weights_SW, chunk_sum_SN, uniform_S)
    rows_F = filtered_rows(filters, greedy_S)
    if rows_F is not None:
        token_S[rows_F] = draw_filtered(logits_SV, divisor_S, uniform_S, filters, rows_F)
    if logits_SV.is_cuda or bool(greedy_S.any()):
        token_S = torch.where(greedy_S, logits_SV.argmax(-1), token_S)
    if masks is not None:
        rows_M = (masks.mask_S >= 0).nonzero().squeeze(1)
        token_S[rows_M] = draw_masked(logits_SV, temperature_S, uniform_S, masks, rows_M)
    chosen_S = logits_SV.gather(1, token_S.unsqueeze(1)).squeeze(1).double()
    total_S = chunk_sum_SN.double().sum(-1)
    if entropy_S is not None:
        entropy_S.copy_(entropy(weights_SW, total_S))
    # The difference first: at low temperature a quotient has no digits left for it.
    logprob_S = (chosen_S - max_S.double()) / divisor_S.double() - total_S.log()
    if masks is not None:
        # What has to come may be ruled out by the logits. Where these are not finite this is NaN.
        lowest_S = torch.where(masks.mask_S >= 0, torch.finfo(torch.float32).min, float("-inf"))
        logprob_S = logprob_S.clamp(min=lowest_S)
    return token_S, logprob_S.float()


def split_temperature(temperature_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows are greedy, and the float32 divisor of each row's logits (1 where greedy)."""
    greedy_S = temperature_S < GREEDY_BELOW
    return greedy_S, temperature_S.float().masked_fill(greedy_S, 1.0)


def exp_weights(
    logits_SV: torch.Tensor, divisor_S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """exp((logits - max) / divisor) as float32 [S, W], 0 in the padding, and that max [S]."""
    num_rows, vocab = logits_SV.shape
    width = -(-vocab // CHUNK) * CHUNK
    weights_SW = torch.empty(num_rows, width, dtype=torch.float32, device=logits_SV.device)
    weights_SW[:, vocab:] = float("-inf")
    max_S = logits_SV.amax(-1).float()
    torch.sub(logits_SV, max_S.unsqueeze(1), out=weights_SW[:, :vocab])
    # One pass less where it would change nothing; on a GPU the look would cost more.
    if logits_SV.is_cuda or bool((divisor_S != 1).any()):
        weights_SW.div_(divisor_S.unsqueeze(1))
    return weights_SW.exp_(), max_S


def entropy(weights_SW: torch.Tensor, total_S: torch.Tensor) -> torch.Tensor:
    """Nats, float64 [S], of the distribution that weights over their total make.

    log(total) - sum(w log w) / total: a token of weight 0 adds nothing.
    """
    inner_SN = torch.special.entr(weights_SW).unflatten(1, (-1, CHUNK)).sum(-1)
    # Rounding may leave a sure token a little less than nothing.
    return (total_S.log() + inner_SN.double().sum(-1) / total_S).clamp(min=0)


def inverse_cdf(
    weights_SW: torch.Tensor, chunk_sum_SN: torch.Tensor, uniform_S: torch.Tensor
) -> torch.Tensor:
    """The first token whose cumulative weight exceeds uniform * total; int64 [S]."""
    cumulative_SN = chunk_sum_SN.double().cumsum(-1)
    target_S = uniform_S * cumulative_SN[:, -1]
    chunk_S1 = first_above(cumulative_SN, chunk_sum_SN, target_S).unsqueeze(1)
    before_S = torch.nn.functional.pad(cumulative_SN, (1, 0)).gather(1, chunk_S1).squeeze(1)
    index_SC = chunk_S1 * CHUNK + torch.arange(CHUNK, device=weights_SW.device)
    inside_SC = weights_SW.gather(1, index_SC)
    offset_S = first_above(inside_SC.double().cumsum(-1), inside_SC, target_S - before_S)
    return chunk_S1.squeeze(1) * CHUNK + offset_S


def first_above(
    cumulative_SX: torch.Tensor, weights_SX: torch.Tensor, target_S: torch.Tensor
) -> torch.Tensor:
    """First index of positive weight whose cumulative sum exceeds the target.

    Where rounding leaves none (the parts of a chunk may add up to a little less than its
    sum), the last index of positive weight; 0 where there is no such index.
    """
    size = weights_SX.shape[1]
    index_X = torch.arange(size, device=weights_SX.device)
    positive_SX = weights_SX > 0
    above_SX = positive_SX & (cumulative_SX > target_S.unsqueeze(1))
    first_S = torch.where(above_SX, index_X, size).amin(-1)
    last_S = torch.where(positive_SX, index_X, 0).amax(-1)
    return torch.minimum(first_S, last_S)


def draw_masked(
    logits_SV: torch.Tensor,
    temperature_S: torch.Tensor,
    uniform_S: torch.Tensor,
    masks: TokenMasks,
    rows_M: torch.Tensor,
) -> torch.Tensor:
    """Tokens of the rows that have a mask: int64 [M]."""
    greedy_M, divisor_M = split_temperature(temperature_S[rows_M])
    law_MV = restrict_(logits_SV[rows_M], masks.bits_MB[masks.mask_S[rows_M]])
    weights_MW, _ = exp_weights(law_MV, divisor_M)
    chunk_sum_MN = weights_MW.unflatten(1, (-1, CHUNK)).sum(-1)
    token_M = inverse_cdf(weights_MW, chunk_sum_MN, uniform_S[rows_M])
    return torch.where(greedy_M, law_MV.argmax(-1), token_M)


def draw_filtered(
    logits_SV: torch.Tensor,
    divisor_S: torch.Tensor,
    uniform_S: torch.Tensor,
    filters: Filters,
    rows_F: torch.Tensor,
) -> torch.Tensor:
    """Tokens of the rows that have a filter: int64 [F]."""
    weights_FW, _ = exp_weights(logits_SV[rows_F], divisor_S[rows_F])
    scaled_FV = logits_SV[rows_F].float() / divisor_S[rows_F].unsqueeze(1)
    top_k_F, top_p_F, min_p_F = (None if value is None else value[rows_F] for value in filters)
    keep_FV = keep_mask(scaled_FV, top_k_F, top_p_F, min_p_F)
    weights_FW[:, : keep_FV.shape[1]].mul_(keep_FV)
    chunk_sum_FN = weights_FW.unflatten(1, (-1, CHUNK)).sum(-1)
    return inverse_cdf(weights_FW, chunk_sum_FN, uniform_S[rows_F])
