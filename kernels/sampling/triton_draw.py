"""The two kernels every row takes: sums of its chunks, then the search for its token.

Shapes: V vocabulary, N chunks of C tokens (C as in the reference, so that both search the
same partial sums).

The first kernel reads the logits once and leaves, for each chunk, its largest logit m, the sum
of the weights w = exp((logit - m) / temperature) and, where entropy is wanted, the sum of
w log2(w). The second one works on these few numbers and one chunk of logits.

A row with a mask has two laws: its own, of the logits, whose sums lie at the row, and the masked
one, whose sums lie as many rows behind as there are rows. The token is searched in the second, and
every number is of the first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.sampling.reference import GREEDY_BELOW
from kernels.sampling.triton_philox import uniform

_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)
_LOWEST_LOGPROB = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def is_greedy(temperature: tl.tensor) -> tl.tensor:
    """Whether a row takes its likeliest token."""
    return temperature < _GREEDY_BELOW


@triton.jit
def divisor_of(temperature: tl.tensor) -> tl.tensor:
    """What logits are divided by: 1 in a greedy row."""
    return tl.where(is_greedy(temperature), 1.0, temperature)


@triton.jit
def scale_of(divisor: tl.tensor) -> tl.tensor:
    """What a difference of logits is multiplied by to give the log2 of their weights' ratio."""
    scale = 1.4426950408889634 / divisor
    # At the highest temperatures it vanishes, and a banned token's -inf * 0 is no weight.
    return tl.where(scale > 1e-37, scale, 1e-37)


@triton.jit
def weight_of(logits: tl.tensor, maximum: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """exp((logits - maximum) / temperature), float32: differences lose nothing to a division."""
    return tl.exp2((logits - maximum) * scale)


@triton.jit
def logprob_of(
    logit: tl.tensor, maximum: tl.tensor, divisor: tl.tensor, total: tl.tensor
) -> tl.tensor:
    """Log of a token's share of the total weight; one division, in float64."""
    above = logit.to(tl.float64) - maximum.to(tl.float64)
    return (above / divisor.to(tl.float64) - tl.log(total)).to(tl.float32)


@triton.jit
def first_above(
    cumulative_X: tl.tensor, weights_X: tl.tensor, target: tl.tensor, X: tl.constexpr
) -> tl.tensor:
    """`kernels.sampling.reference.first_above` of one row."""
    index_X = tl.arange(0, X)
    above_X = (weights_X > 0) & (cumulative_X > target)
    first = tl.min(tl.where(above_X, index_X, X), axis=0)
    last = tl.max(tl.where(weights_X > 0, index_X, 0), axis=0)
    return tl.minimum(first, last)


@triton.jit
def _first_equal(values_X: tl.tensor, value: tl.tensor, X: tl.constexpr) -> tl.tensor:
    found = tl.min(tl.where(values_X == value, tl.arange(0, X), X), axis=0)
    return tl.where(found == X, 0, found)


@triton.jit
def chunk_weights(
    chunk_max_ptr: tl.tensor,
    chunk_sum_ptr: tl.tensor,
    scale: tl.tensor,
    num_chunks: tl.int32,
    N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Of one row: largest logit of each chunk, the row's largest, and the weight of each
    chunk, float64, relative to the row's largest logit."""
    index_N = tl.arange(0, N)
    inside_N = index_N < num_chunks
    max_N = tl.load(chunk_max_ptr + index_N, mask=inside_N, other=float("-inf"))
    sum_N = tl.load(chunk_sum_ptr + index_N, mask=inside_N, other=0.0)
    maximum = tl.max(max_N, axis=0)
    return max_N, maximum, (sum_N * weight_of(max_N, maximum, scale)).to(tl.float64)


@triton.jit
def _allowed(
    bits_ptr: tl.tensor, chunk_N: tl.tensor, vocab: tl.int32, N: tl.constexpr, C: tl.constexpr
) -> tl.tensor:
    """Which tokens of some chunks a mask allows, bool [N, C]; C is a multiple of 32.

    Loaded by the word, so that the compiler leaves the logits beside it where they are, and sums
    them as in a launch without masks: a load for every token would be spread otherwise.
    """
    word_NW = chunk_N[:, None] * (C // 32) + tl.arange(0, C // 32)[None, :]
    bits_NW = tl.load(bits_ptr + word_NW, mask=word_NW * 32 < vocab, other=0)
    bits_NWT = (bits_NW[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return bits_NWT.reshape(N, C) != 0


@triton.jit
def _masked(logits_X: tl.tensor, allowed_X: tl.tensor, LOWEST: tl.constexpr) -> tl.tensor:
    """Logits of the masked law, as `kernels.sampling.masks.restrict_` has them."""
    return tl.where(allowed_X, tl.where(logits_X > LOWEST, logits_X, LOWEST), float("-inf"))


@triton.jit
def _chunk_weights_of(
    logits_NC: tl.tensor, scale: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Largest logit of each chunk, and log2 of the weights relative to it, and these."""
    max_N = tl.max(logits_NC, axis=1)
    # A chunk of banned tokens would give exp(-inf + inf).
    finite_max_N = tl.where(max_N == float("-inf"), 0.0, max_N)
    exponent_NC = (logits_NC - finite_max_N[:, None]) * scale
    return max_N, exponent_NC, tl.exp2(exponent_NC)


@triton.jit
def chunk_kernel(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    chunk_max_ptr: tl.tensor,
    chunk_sum_ptr: tl.tensor,
    chunk_moment_ptr: tl.tensor,
    row_stride: tl.int64,
    vocab: tl.int32,
    num_chunks: tl.int32,
    mask_ptr: tl.tensor,
    bits_ptr: tl.tensor,
    bits_stride: tl.int32,
    LOWEST: tl.constexpr,
    C: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    """chunk_moment_ptr: None where no entropy is wanted. mask_ptr, bits_ptr: None without masks."""
    row = tl.program_id(0).to(tl.int64)
    chunk_N = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)
    token_NC = chunk_N[:, None] * C + tl.arange(0, C)[None, :]
    logits_NC = tl.load(
        logits_ptr + row * row_stride + token_NC, mask=token_NC < vocab, other=float("-inf")
    ).to(tl.float32)
    scale = scale_of(divisor_of(tl.load(temperature_ptr + row)))
    max_N, exponent_NC, weight_NC = _chunk_weights_of(logits_NC, scale)
    offset_N, inside_N = row * num_chunks + chunk_N, chunk_N < num_chunks
    tl.store(chunk_max_ptr + offset_N, max_N, mask=inside_N)
    tl.store(chunk_sum_ptr + offset_N, tl.sum(weight_NC, axis=1), mask=inside_N)
    if chunk_moment_ptr is not None:
        # 2^-200 is 0 in float32; the -inf of a banned token would make 0 * -inf.
        moment_NC = weight_NC * tl.where(exponent_NC > -200.0, exponent_NC, -200.0)
        tl.store(chunk_moment_ptr + offset_N, tl.sum(moment_NC, axis=1), mask=inside_N)
    if mask_ptr is not None:
        index = tl.load(mask_ptr + row).to(tl.int64)
        if index >= 0:
            allowed_NC = _allowed(bits_ptr + index * bits_stride, chunk_N, vocab, CHUNKS, C)
            law_NC = _masked(logits_NC, allowed_NC & (token_NC < vocab), LOWEST)
            law_max_N, _, law_weight_NC = _chunk_weights_of(law_NC, scale)
            law_N = offset_N + tl.num_programs(0).to(tl.int64) * num_chunks
            tl.store(chunk_max_ptr + law_N, law_max_N, mask=inside_N)
            tl.store(chunk_sum_ptr + law_N, tl.sum(law_weight_NC, axis=1), mask=inside_N)


@triton.jit
def _entropy(
    chunk_moment_ptr: tl.tensor,
    exponent_N: tl.tensor,
    weight_N: tl.tensor,
    total: tl.tensor,
    num_chunks: tl.int32,
    N: tl.constexpr,
) -> tl.tensor:
    """log Z - sum(p log w), in nats; exponent_N: log2 of the weight of a chunk's likeliest."""
    index_N = tl.arange(0, N)
    moment_N = tl.load(chunk_moment_ptr + index_N, mask=index_N < num_chunks, other=0.0)
    exponent_N = tl.where(weight_N > 0, exponent_N, 0.0)
    inner_N = (moment_N * tl.exp2(exponent_N)).to(tl.float64)
    outer_N = weight_N * exponent_N.to(tl.float64)
    log2_mean = tl.sum(tl.where(weight_N > 0, inner_N + outer_N, 0.0), axis=0) / total
    entropy = tl.log(total) - log2_mean * 0.6931471805599453
    # Rounding may leave a sure token a little less than nothing. A NaN stays one.
    return tl.where(entropy < 0, 0.0, entropy)


@triton.jit
def search_kernel(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    position_ptr: tl.tensor,
    chunk_max_ptr: tl.tensor,
    chunk_sum_ptr: tl.tensor,
    chunk_moment_ptr: tl.tensor,
    token_ptr: tl.tensor,
    logprob_ptr: tl.tensor,
    entropy_ptr: tl.tensor,
    row_stride: tl.int64,
    vocab: tl.int32,
    num_chunks: tl.int32,
    mask_ptr: tl.tensor,
    bits_ptr: tl.tensor,
    bits_stride: tl.int32,
    LOWEST: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
) -> None:
    """Token, logprob and (unless entropy_ptr is None) entropy of a row without filters."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    greedy, divisor = is_greedy(temperature), divisor_of(temperature)
    scale, at = scale_of(divisor), row * num_chunks
    max_N, maximum, weight_N = chunk_weights(
        chunk_max_ptr + at, chunk_sum_ptr + at, scale, num_chunks, N
    )
    law_max_N, law_maximum, law_weight_N = max_N, maximum, weight_N
    if mask_ptr is not None:
        index = tl.load(mask_ptr + row).to(tl.int64)
        law_at = at + tl.where(index >= 0, tl.num_programs(0).to(tl.int64) * num_chunks, 0)
        law_max_N, law_maximum, law_weight_N = chunk_weights(
            chunk_max_ptr + law_at, chunk_sum_ptr + law_at, scale, num_chunks, N
        )
    cumulative_N = tl.cumsum(law_weight_N, axis=0)
    total = tl.sum(weight_N, axis=0)
    law_total = total if mask_ptr is None else tl.sum(law_weight_N, axis=0)
    target = uniform(tl.load(seed_ptr + row), tl.load(position_ptr + row)) * law_total
    drawn_chunk = first_above(cumulative_N, law_weight_N, target, N)
    chunk = tl.where(greedy, _first_equal(law_max_N, law_maximum, N), drawn_chunk)
    before = tl.sum(tl.where(tl.arange(0, N) == chunk - 1, cumulative_N, 0.0), axis=0)

    token_C = chunk * C + tl.arange(0, C)
    logits_C = tl.load(
        logits_ptr + row * row_stride + token_C, mask=token_C < vocab, other=float("-inf")
    ).to(tl.float32)
    law_C = logits_C
    if mask_ptr is not None:
        # Any mask may be read where there is none.
        own_ptr = bits_ptr + tl.maximum(index, 0) * bits_stride
        allowed_C = _allowed(own_ptr, chunk + tl.arange(0, 1), vocab, 1, C).reshape(C)
        masked_C = _masked(logits_C, allowed_C & (token_C < vocab), LOWEST)
        law_C = tl.where(index >= 0, masked_C, logits_C)
    weight_C = weight_of(law_C, law_maximum, scale)
    cumulative_C = tl.cumsum(weight_C.to(tl.float64), axis=0)
    drawn_offset = first_above(cumulative_C, weight_C, target - before, C)
    offset = tl.where(greedy, _first_equal(law_C, law_maximum, C), drawn_offset)
    chosen = tl.sum(tl.where(tl.arange(0, C) == offset, logits_C, 0.0), axis=0)
    # A greedy row of NaN finds its largest logit, -inf, behind the vocabulary.
    tl.store(token_ptr + row, tl.minimum(chunk * C + offset, vocab - 1).to(tl.int64))
    logprob = logprob_of(chosen, maximum, divisor, total)
    if mask_ptr is not None:
        # What has to come may be ruled out by the logits. Where these are not finite this is NaN.
        unlikely = (index >= 0) & (logprob < _LOWEST_LOGPROB)
        logprob = tl.where(unlikely, _LOWEST_LOGPROB, logprob)
    tl.store(logprob_ptr + row, logprob)
    if entropy_ptr is not None:
        exponent_N = (max_N - maximum) * scale
        entropy = _entropy(chunk_moment_ptr + at, exponent_N, weight_N, total, num_chunks, N)
        tl.store(entropy_ptr + row, entropy.to(tl.float32))
