"""Draws of the rows with a filter: no sort, no copy of the logits, no word with the host.

Shapes: V vocabulary, N chunks of C tokens, B chunks looked at together, X any number of logits.

One program a row: it finds the row's cut, weighs what each chunk keeps, and searches these
weights as the plain kernel searches its own. Sums are taken in a fixed order, so that a row's
token does not depend on its batch.

Which logits are above or at the cut is asked of logits over temperature, rounded as in
`kernels.sampling.filters`: a division may make neighbours equal.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.sampling.triton_cut import cut_of_row, list_chunks, load_chunks
from kernels.sampling.triton_draw import (
    chunk_weights,
    divisor_of,
    first_above,
    is_greedy,
    logprob_of,
    scale_of,
    weight_of,
)
from kernels.sampling.triton_philox import uniform


@triton.jit
def _over(logits: tl.tensor, divisor: tl.tensor) -> tl.tensor:
    """Logits over temperature, rounded once."""
    return tl.div_rn(logits, divisor + tl.zeros_like(logits))


@triton.jit
def _keep(
    logits_X: tl.tensor,
    cut: tl.tensor,
    floor: tl.tensor,
    maximum: tl.tensor,
    divisor: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Weights of the logits above cut and floor, and which are at the cut."""
    scaled_X = _over(logits_X, divisor)
    above_X = (scaled_X > cut) & (scaled_X >= floor)
    weight_X = weight_of(logits_X, maximum, scale_of(divisor))
    return tl.where(above_X, weight_X, 0.0), scaled_X == cut


@triton.jit
def _weigh_chunks(
    logits_ptr: tl.tensor,
    list_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    tied_ptr: tl.tensor,
    num: tl.tensor,
    cut_logit: tl.tensor,
    floor: tl.tensor,
    maximum: tl.tensor,
    divisor: tl.tensor,
    vocab: tl.int32,
    B: tl.constexpr,
    C: tl.constexpr,
) -> tl.tensor:
    """Write, for each listed chunk, the weight above the cut and the number at it.

    Returns how many logits above `cut_logit` are at the cut once divided: they have a right
    to stay, and so make room for as many of the others there.
    """
    cut = _over(cut_logit, divisor)
    merged_B = tl.zeros([B], tl.int32)
    index_B = tl.arange(0, B)
    raw_BC = load_chunks(logits_ptr, list_ptr, index_B, num, vocab, C)
    for start in range(B, num + B, B):
        logits_BC = raw_BC.to(tl.float32)
        raw_BC = load_chunks(logits_ptr, list_ptr, start + index_B, num, vocab, C)
        weight_BC, tied_BC = _keep(logits_BC, cut, floor, maximum, divisor)
        at_B = start - B + index_B
        inside_B = at_B < num
        tl.store(weight_ptr + at_B, tl.sum(weight_BC, axis=1), mask=inside_B)
        tl.store(tied_ptr + at_B, tl.sum(tied_BC.to(tl.int32), axis=1), mask=inside_B)
        merged_B += tl.sum((tied_BC & (logits_BC > cut_logit)).to(tl.int32), axis=1)
    tl.debug_barrier()
    return tl.sum(merged_B, axis=0)


@triton.jit
def _draw_kept(
    logits_ptr: tl.tensor,
    list_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    tied_ptr: tl.tensor,
    max_N: tl.tensor,
    cut_logit: tl.tensor,
    room: tl.tensor,
    floor: tl.tensor,
    maximum: tl.tensor,
    divisor: tl.tensor,
    share: tl.tensor,
    vocab: tl.int32,
    B: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The kept token at `share` of their weight, in vocabulary order, and its logit."""
    cut = _over(cut_logit, divisor)
    scaled_max_N = _over(max_N, divisor)
    num = list_chunks(list_ptr, (scaled_max_N >= cut) & (scaled_max_N >= floor), N)
    room += _weigh_chunks(
        logits_ptr,
        list_ptr,
        weight_ptr,
        tied_ptr,
        num,
        cut_logit,
        floor,
        maximum,
        divisor,
        vocab,
        B,
        C,
    )
    tie_weight = tl.where(cut >= floor, weight_of(cut_logit, maximum, scale_of(divisor)), 0.0)
    index_N = tl.arange(0, N)
    inside_N = index_N < num
    tied_N = tl.load(tied_ptr + index_N, mask=inside_N, other=0).to(tl.int64)
    left_N = room - (tl.cumsum(tied_N, axis=0) - tied_N)
    tied_N = tl.maximum(tl.minimum(tied_N, left_N), 0)
    weight_N = tl.load(weight_ptr + index_N, mask=inside_N, other=0.0).to(tl.float64)
    weight_N += tied_N.to(tl.float64) * tie_weight.to(tl.float64)
    cumulative_N = tl.cumsum(weight_N, axis=0)
    target = share * tl.sum(weight_N, axis=0)
    at = first_above(cumulative_N, weight_N, target, N)
    before = tl.sum(tl.where(index_N == at - 1, cumulative_N, 0.0), axis=0)
    tied = tl.sum(tl.where(index_N == at, tied_N, 0), axis=0)

    chunk = tl.load(list_ptr + at, mask=at < num, other=0)
    token_C = chunk * C + tl.arange(0, C)
    logits_C = tl.load(logits_ptr + token_C, mask=token_C < vocab, other=float("-inf"))
    logits_C = logits_C.to(tl.float32)
    weight_C, tied_C = _keep(logits_C, cut, floor, maximum, divisor)
    kept_C = tied_C & (tl.cumsum(tied_C.to(tl.int32), axis=0) <= tied)
    weight_C = tl.where(kept_C, tie_weight, weight_C)
    cumulative_C = tl.cumsum(weight_C.to(tl.float64), axis=0)
    offset = first_above(cumulative_C, weight_C, target - before, C)
    return chunk * C + offset, tl.sum(tl.where(tl.arange(0, C) == offset, logits_C, 0.0), axis=0)


@triton.jit
def filter_kernel(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    position_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    chunk_max_ptr: tl.tensor,
    chunk_sum_ptr: tl.tensor,
    list_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    tied_ptr: tl.tensor,
    token_ptr: tl.tensor,
    logprob_ptr: tl.tensor,
    row_stride: tl.int64,
    vocab: tl.int32,
    num_chunks: tl.int32,
    SHIFT: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
) -> None:
    """Token and logprob of each row with a filter; other rows are left as they are.

    top_k_ptr, top_p_ptr, min_p_ptr: None where no row uses that one. list_ptr, weight_ptr,
    tied_ptr: scratch of num_chunks a row.
    """
    row = tl.program_id(0).to(tl.int64)
    temperature, at = tl.load(temperature_ptr + row), row * num_chunks
    top_k, top_p, min_p = row * 0, temperature.to(tl.float64) * 0 + 1, temperature * 0
    if top_k_ptr is not None:
        top_k = tl.load(top_k_ptr + row).to(tl.int64)
    if top_p_ptr is not None:
        top_p = tl.load(top_p_ptr + row).to(tl.float64)
    if min_p_ptr is not None:
        min_p = tl.minimum(tl.load(min_p_ptr + row).to(tl.float32), 1.0)
    if ((top_k > 0) | (top_p < 1) | (min_p > 0)) & (is_greedy(temperature) == 0):
        logits_ptr += row * row_stride
        divisor = divisor_of(temperature)
        max_N, maximum, weight_N = chunk_weights(
            chunk_max_ptr + at, chunk_sum_ptr + at, scale_of(divisor), num_chunks, N
        )
        total = tl.sum(weight_N, axis=0)
        cut, room = cut_of_row(
            logits_ptr,
            list_ptr + at,
            max_N,
            maximum,
            divisor,
            total,
            top_k,
            top_p,
            vocab,
            num_chunks,
            SHIFT,
            B,
            C,
            N,
        )
        log_min_p = tl.log(tl.where(min_p > 0, min_p, 1.0).to(tl.float64)).to(tl.float32)
        floor = tl.where(min_p > 0, _over(maximum, divisor) + log_min_p, float("-inf"))
        token, chosen = _draw_kept(
            logits_ptr,
            list_ptr + at,
            weight_ptr + at,
            tied_ptr + at,
            max_N,
            cut,
            room,
            floor,
            maximum,
            divisor,
            uniform(tl.load(seed_ptr + row), tl.load(position_ptr + row)),
            vocab,
            B,
            C,
            N,
        )
        tl.store(token_ptr + row, tl.minimum(token, vocab - 1).to(tl.int64))
        tl.store(logprob_ptr + row, logprob_of(chosen, maximum, divisor, total))
