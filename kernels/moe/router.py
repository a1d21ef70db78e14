"""From tokens to the ids and weights of their experts: a product, then a program a token.

T tokens, N experts, H hidden width; in the second kernel K experts of a token, and experts in an
array [G, M] of groups and their members, both padded to powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEVER: tl.constexpr = tl.constexpr(-(1 << 63))
"""Below the key of every number."""
_LEAST_SUM: tl.constexpr = tl.constexpr(1e-20)


@triton.jit(do_not_specialize=["rows"])
def logits_kernel(
    x_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    x_stride: tl.int64,
    rows: tl.int32,
    N: tl.constexpr,
    H: tl.constexpr,
    PART: tl.constexpr,
    APART: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """float32 sums [parts, T, N]; or [1, T, N], the parts added up in their order."""
    row_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(2)
    last = first + 1 if APART else (H + PART - 1) // PART
    sum_NT = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for part in tl.range(first, last):
        part_NT = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        begin = part * PART
        for start in tl.range(begin, tl.minimum(begin + PART, H), BLOCK_H, num_stages=4):
            input_H = start + tl.arange(0, BLOCK_H)
            inside_HT = (input_H[:, None] < H) & (row_T[None, :] < rows)
            x_pointers_HT = x_ptr + row_T[None, :] * x_stride + input_H[:, None]
            x_HT = tl.load(x_pointers_HT, mask=inside_HT, other=0.0)
            inside_NH = (expert_N[:, None] < N) & (input_H[None, :] < H)
            gate_pointers_NH = gate_ptr + expert_N[:, None] * H + input_H[None, :]
            gate_NH = tl.load(gate_pointers_NH, mask=inside_NH, other=0.0)
            part_NT = tl.dot(gate_NH, x_HT, part_NT, input_precision="ieee")
        sum_NT += part_NT
    out_NT = parts_ptr + (first * rows + row_T)[None, :] * N + expert_N[:, None]
    tl.store(out_NT, sum_NT, mask=(expert_N[:, None] < N) & (row_T[None, :] < rows))


@triton.jit
def _scores(logit: tl.tensor, inside: tl.tensor, SIGMOID: tl.constexpr) -> tl.tensor:
    if SIGMOID:
        return 1.0 / (1.0 + tl.exp(-logit))
    largest = tl.max(tl.max(tl.where(inside, logit, float("-inf")), axis=1), axis=0)
    power = tl.where(inside, tl.exp(logit - largest), 0.0)
    return power / tl.sum(tl.sum(power, axis=1), axis=0)


@triton.jit
def _keys(value: tl.tensor, index: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """int64 that are ordered as the values are, NaN above all, the lower index first among equals.
    All differ, so that the highest is one place, whatever the values are."""
    bits = tl.where(value != value, 0x7FC00000, value.to(tl.int32, bitcast=True))
    # Of negative numbers the larger bits are the smaller value.
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)
    return tl.where(inside, keys, NEVER)


@triton.jit
def _index_of(key: tl.tensor) -> tl.tensor:
    return 0x7FFFFFFF - (key & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _of_best_groups(
    value_GM: tl.tensor,
    inside_GM: tl.tensor,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TWO: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> tl.tensor:
    """Whether an expert is in one of the groups that are chosen."""
    value_GM = tl.where(inside_GM, value_GM, float("-inf"))
    best_G = tl.max(value_GM, axis=1)
    if TWO:
        member_GM = tl.arange(0, BLOCK_M)[None, :]
        first_G = tl.min(tl.where(value_GM == best_G[:, None], member_GM, BLOCK_M), axis=1)
        others_GM = tl.where(member_GM == first_G[:, None], float("-inf"), value_GM)
        best_G += tl.max(others_GM, axis=1)
    group_G = tl.arange(0, BLOCK_G)
    keys_G = _keys(best_G, group_G, group_G < GROUPS)
    for _ in tl.static_range(TOP_GROUPS):
        keys_G = tl.where(keys_G == tl.max(keys_G, axis=0), NEVER, keys_G)
    return inside_GM & (keys_G == NEVER)[:, None]


@triton.jit(do_not_specialize=["rows", "parts"])
def top_experts_kernel(
    parts_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    num_rows_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    rows: tl.int32,
    parts: tl.int32,
    scale: tl.float32,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TWO: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALISED: tl.constexpr,
    BIAS: tl.constexpr,
    FILLED: tl.constexpr,
    ROUND_LOGITS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One token. ROUND_LOGITS: to DTYPE. FILLED: num_rows_ptr holds how many rows are tokens.
    TOP_GROUPS: 0 to choose from all experts."""
    row = tl.program_id(0).to(tl.int64)
    place_K = tl.arange(0, BLOCK_K)
    out_K = row * TOP_K + place_K
    num_tokens = rows
    if FILLED:
        num_tokens = tl.load(num_rows_ptr)
    if row >= num_tokens:
        tl.store(ids_ptr + out_K, tl.full((BLOCK_K,), -1, tl.int32), mask=place_K < TOP_K)
        nothing_K = tl.zeros((BLOCK_K,), weights_ptr.dtype.element_ty)
        tl.store(weights_ptr + out_K, nothing_K, mask=place_K < TOP_K)
        return
    MEMBERS: tl.constexpr = N // GROUPS
    group_G, member_M = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_M)
    expert_GM = group_G[:, None] * MEMBERS + member_M[None, :]
    inside_GM = (group_G < GROUPS)[:, None] & (member_M < MEMBERS)[None, :]
    logit_GM = tl.zeros((BLOCK_G, BLOCK_M), tl.float32)
    for part in tl.range(parts):
        pointers_GM = parts_ptr + (part * rows + row) * N + expert_GM
        logit_GM += tl.load(pointers_GM, mask=inside_GM, other=0.0)
    if ROUND_LOGITS:
        logit_GM = logit_GM.to(DTYPE).to(tl.float32)
    score_GM = _scores(logit_GM, inside_GM, SIGMOID)
    value_GM = score_GM
    if BIAS:
        value_GM += tl.load(bias_ptr + expert_GM, mask=inside_GM, other=0.0)
    open_GM = inside_GM
    if TOP_GROUPS > 0:
        open_GM = _of_best_groups(value_GM, inside_GM, GROUPS, TOP_GROUPS, TWO, BLOCK_G, BLOCK_M)
    keys_GM = _keys(value_GM, expert_GM, open_GM)
    ids_K = tl.zeros((BLOCK_K,), tl.int32)
    weights_K = tl.zeros((BLOCK_K,), tl.float32)
    for place in tl.static_range(TOP_K):
        best = tl.max(tl.max(keys_GM, axis=1), axis=0)
        expert = _index_of(best)
        weight_GM = tl.where(expert_GM == expert, score_GM, 0.0)
        weight = tl.sum(tl.sum(tl.where(inside_GM, weight_GM, 0.0), axis=1), axis=0)
        ids_K = tl.where(place_K == place, expert, ids_K)
        weights_K = tl.where(place_K == place, weight, weights_K)
        keys_GM = tl.where(keys_GM == best, NEVER, keys_GM)
    if NORMALISED:
        weights_K = weights_K / (tl.sum(weights_K, axis=0) + _LEAST_SUM)
    weights_K = weights_K * scale
    tl.store(ids_ptr + out_K, ids_K, mask=place_K < TOP_K)
    tl.store(weights_ptr + out_K, weights_K.to(weights_ptr.dtype.element_ty), mask=place_K < TOP_K)
