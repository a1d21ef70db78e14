"""Sampling on GPU in two kernels: chunk sums of the whole vocabulary, then the search.

Shapes: S rows, V vocabulary, N chunks of C tokens (C as in the reference, so that both
search the same partial sums).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.sampling.filters import Filters, filtered_rows
from kernels.sampling.philox import MULTIPLIER_0, MULTIPLIER_1, ROUNDS, WEYL_0, WEYL_1
from kernels.sampling.philox import philox_uniform as philox_uniform_torch
from kernels.sampling.reference import CHUNK, GREEDY_BELOW, draw_filtered, split_temperature

CHUNKS_PER_PROGRAM = 8

_ROUNDS = tl.constexpr(ROUNDS)
_MULTIPLIER_0, _MULTIPLIER_1 = tl.constexpr(MULTIPLIER_0), tl.constexpr(MULTIPLIER_1)
_WEYL_0, _WEYL_1 = tl.constexpr(WEYL_0), tl.constexpr(WEYL_1)
_LOW = tl.constexpr(0xFFFFFFFF)
_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)


@triton.jit
def _uniform(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """`kernels.sampling.philox.philox_uniform`, bit for bit; int64 in, float64 out."""
    c0, c1 = position & _LOW, (position >> 32) & _LOW
    c2, c3 = position & 0, position & 0
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in tl.static_range(_ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0 = ((product_1 >> 32) & _LOW) ^ c1 ^ k0
        c2 = ((product_0 >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = product_1 & _LOW, product_0 & _LOW
        k0, k1 = (k0 + _WEYL_0) & _LOW, (k1 + _WEYL_1) & _LOW
    bits = (c0 << 20) | (c1 >> 12)
    return (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16


@triton.jit
def _uniform_kernel(
    seed_ptr: tl.tensor, position_ptr: tl.tensor, out_ptr: tl.tensor, size: tl.int32
) -> None:
    offset = tl.program_id(0) * 128 + tl.arange(0, 128)
    inside = offset < size
    seed = tl.load(seed_ptr + offset, mask=inside, other=0)
    position = tl.load(position_ptr + offset, mask=inside, other=0)
    tl.store(out_ptr + offset, _uniform(seed, position), mask=inside)


@triton.jit
def _divisor(temperature: tl.tensor) -> tl.tensor:
    return tl.where(temperature < _GREEDY_BELOW, 1.0, temperature)


@triton.jit
def _chunk_kernel(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    chunk_max_ptr: tl.tensor,
    chunk_sum_ptr: tl.tensor,
    row_stride: tl.int64,
    vocab: tl.int32,
    num_chunks: tl.int32,
    C: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    chunk_N = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)
    token_NC = chunk_N[:, None] * C + tl.arange(0, C)[None, :]
    logits_NC = tl.load(
        logits_ptr + row * row_stride + token_NC, mask=token_NC < vocab, other=float("-inf")
    )
    divisor = _divisor(tl.load(temperature_ptr + row))
    scaled_NC = tl.div_rn(logits_NC.to(tl.float32), divisor + tl.zeros_like(token_NC))
    max_N = tl.max(scaled_NC, axis=1)
    # A chunk of banned tokens would give exp(-inf + inf).
    finite_max_N = tl.where(max_N == float("-inf"), 0.0, max_N)
    sum_N = tl.sum(tl.exp(scaled_NC - finite_max_N[:, None]), axis=1)
    offset_N = row * num_chunks + chunk_N
    tl.store(chunk_max_ptr + offset_N, max_N, mask=chunk_N < num_chunks)
    tl.store(chunk_sum_ptr + offset_N, sum_N, mask=chunk_N < num_chunks)


@triton.jit
def _first_above(
    cumulative_X: tl.tensor, weights_X: tl.tensor, target: tl.tensor, X: tl.constexpr
) -> tl.tensor:
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
def _search_kernel(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    position_ptr: tl.tensor,
    chunk_max_ptr: tl.tensor,
    chunk_sum_ptr: tl.tensor,
    forced_ptr: tl.tensor,
    token_ptr: tl.tensor,
    logprob_ptr: tl.tensor,
    row_stride: tl.int64,
    vocab: tl.int32,
    num_chunks: tl.int32,
    C: tl.constexpr,
    N: tl.constexpr,
    FORCED: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    greedy = temperature < _GREEDY_BELOW
    index_N = tl.arange(0, N)
    inside_N = index_N < num_chunks
    offset_N = row * num_chunks + index_N
    chunk_max_N = tl.load(chunk_max_ptr + offset_N, mask=inside_N, other=float("-inf"))
    chunk_sum_N = tl.load(chunk_sum_ptr + offset_N, mask=inside_N, other=0.0)
    row_max = tl.max(chunk_max_N, axis=0)
    weight_N = (chunk_sum_N * tl.exp(chunk_max_N - row_max)).to(tl.float64)
    cumulative_N = tl.cumsum(weight_N, axis=0)
    total = tl.sum(weight_N, axis=0)
    uniform = _uniform(tl.load(seed_ptr + row), tl.load(position_ptr + row))
    target = uniform * total
    drawn_chunk = _first_above(cumulative_N, weight_N, target, N)
    chunk = tl.where(greedy, _first_equal(chunk_max_N, row_max, N), drawn_chunk)
    before = tl.sum(tl.where(index_N == chunk - 1, cumulative_N, 0.0), axis=0)

    token_C = chunk * C + tl.arange(0, C)
    logits_C = tl.load(
        logits_ptr + row * row_stride + token_C, mask=token_C < vocab, other=float("-inf")
    ).to(tl.float32)
    divisor_C = _divisor(temperature) + tl.zeros_like(logits_C)
    scaled_C = tl.div_rn(logits_C, divisor_C)
    weight_C = tl.exp(scaled_C - row_max)
    cumulative_C = tl.cumsum(weight_C.to(tl.float64), axis=0)
    drawn_offset = _first_above(cumulative_C, weight_C, target - before, C)
    offset = tl.where(greedy, _first_equal(scaled_C, row_max, C), drawn_offset)
    token = chunk * C + offset
    chosen = tl.sum(tl.where(tl.arange(0, C) == offset, scaled_C, 0.0), axis=0)
    if FORCED:
        forced = tl.load(forced_ptr + row)
        if forced >= 0:
            token = forced.to(tl.int32)
            logit = tl.load(logits_ptr + row * row_stride + forced).to(tl.float32)
            chosen = tl.div_rn(logit, _divisor(temperature))
    tl.store(token_ptr + row, token.to(tl.int64))
    log_total = tl.log(total)
    logprob = chosen.to(tl.float64) - row_max.to(tl.float64) - log_total
    tl.store(logprob_ptr + row, logprob.to(tl.float32))


def philox_uniform(seed_S: torch.Tensor, position_S: torch.Tensor) -> torch.Tensor:
    """`kernels.sampling.philox_uniform` as the kernels compute it; for tests."""
    out_S = torch.empty(seed_S.shape, dtype=torch.float64, device=seed_S.device)
    size = seed_S.numel()
    _uniform_kernel[(triton.cdiv(size, 128),)](seed_S, position_S, out_S, size)
    return out_S


def sample(
    logits_SV: torch.Tensor,
    temperature_S: torch.Tensor,
    seed_S: torch.Tensor,
    position_S: torch.Tensor,
    filters: Filters,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.sampling.sample`. Rows with a filter are drawn by the torch reference."""
    num_rows, vocab = logits_SV.shape
    token_S = torch.empty(num_rows, dtype=torch.int64, device=logits_SV.device)
    logprob_S = torch.empty(num_rows, dtype=torch.float32, device=logits_SV.device)
    if num_rows == 0:
        return token_S, logprob_S
    if logits_SV.stride(1) != 1:
        logits_SV = logits_SV.contiguous()
    temperature_S = temperature_S.float()
    num_chunks = triton.cdiv(vocab, CHUNK)
    chunk_max_SN = torch.empty(num_rows, num_chunks, device=logits_SV.device)
    chunk_sum_SN = torch.empty_like(chunk_max_SN)
    size = (logits_SV.stride(0), vocab, num_chunks)
    _chunk_kernel[(num_rows, triton.cdiv(num_chunks, CHUNKS_PER_PROGRAM))](
        logits_SV,
        temperature_S,
        chunk_max_SN,
        chunk_sum_SN,
        *size,
        C=CHUNK,
        CHUNKS=CHUNKS_PER_PROGRAM,
    )
    forced_S = _draw_filtered_rows(logits_SV, temperature_S, seed_S, position_S, filters)
    _search_kernel[(num_rows,)](
        logits_SV,
        temperature_S,
        seed_S,
        position_S,
        chunk_max_SN,
        chunk_sum_SN,
        token_S if forced_S is None else forced_S,
        token_S,
        logprob_S,
        *size,
        C=CHUNK,
        N=triton.next_power_of_2(num_chunks),
        FORCED=forced_S is not None,
    )
    return token_S, logprob_S


def _draw_filtered_rows(
    logits_SV: torch.Tensor,
    temperature_S: torch.Tensor,
    seed_S: torch.Tensor,
    position_S: torch.Tensor,
    filters: Filters,
) -> torch.Tensor | None:
    """Tokens of the rows with a filter, -1 elsewhere; None without such rows."""
    if all(values_S is None for values_S in filters):
        return None
    greedy_S, divisor_S = split_temperature(temperature_S)
    rows_F = filtered_rows(filters, greedy_S)
    if rows_F is None:
        return None
    uniform_S = philox_uniform_torch(seed_S, position_S)
    forced_S = torch.full_like(seed_S, -1)
    forced_S[rows_F] = draw_filtered(logits_SV, divisor_S, uniform_S, filters, rows_F)
    return forced_S
