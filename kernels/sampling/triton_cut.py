"""The smallest logit that top-k or top-p leaves, found without a sort.

Shapes: V vocabulary, N chunks of C tokens, B chunks looked at together.

What top-k or top-p leaves is all logits above a cut and some of those equal to it, the lowest
ids first. The cut is found by search over the floats themselves, taken as ordered integers (as
radix sorts do): four candidates a pass, each with the number (top-k) or the weight (top-p) of
the logits above it, which leaves a fifth of the range. A pass reads only chunks whose largest
logit is above the lowest candidate; the k-th largest of these maxima bounds a top-k cut from
below, and what all V tokens could weigh at most bounds a top-p cut.

Sums are taken in a fixed order, so that a cut depends on its row only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.sampling.triton_draw import scale_of, weight_of


@triton.jit
def _key(value: tl.tensor, SHIFT: tl.constexpr) -> tl.tensor:
    """A float32 as an integer of the same order. SHIFT: low bits that are zero in all values
    of the logits' type, dropped."""
    bits = value.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered >> SHIFT).to(tl.int64)


@triton.jit
def _value(key: tl.tensor, SHIFT: tl.constexpr) -> tl.tensor:
    """The float32 of a key."""
    ordered = key.to(tl.int32) << SHIFT
    # What was dropped of a negative value is ones in this order.
    negative = (ordered | ((1 << SHIFT) - 1)) ^ 0x7FFFFFFF
    return tl.where(key < 0, negative, ordered).to(tl.float32, bitcast=True)


@triton.jit
def _least_key(SHIFT: tl.constexpr) -> tl.tensor:
    """Key of -inf, the logit of a banned token."""
    return _key(tl.full([], float("-inf"), tl.float32), SHIFT)


@triton.jit
def list_chunks(list_ptr: tl.tensor, wanted_N: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """Write the indices of the wanted chunks, ascending; returns how many they are."""
    rank_N = tl.cumsum(wanted_N.to(tl.int32), axis=0)
    # The program's threads read each other's writes: not before all are done with the last list.
    tl.debug_barrier()
    tl.store(list_ptr + rank_N - 1, tl.arange(0, N), mask=wanted_N)
    tl.debug_barrier()
    return tl.sum(wanted_N.to(tl.int32), axis=0)


@triton.jit
def load_chunks(
    logits_ptr: tl.tensor,
    list_ptr: tl.tensor,
    index_B: tl.tensor,
    num: tl.tensor,
    vocab: tl.int32,
    C: tl.constexpr,
) -> tl.tensor:
    """Logits of the listed chunks, [B, C]; -inf past the end."""
    inside_B = index_B < num
    chunk_B = tl.load(list_ptr + index_B, mask=inside_B, other=0)
    token_BC = chunk_B[:, None] * C + tl.arange(0, C)[None, :]
    inside_BC = inside_B[:, None] & (token_BC < vocab)
    return tl.load(logits_ptr + token_BC, mask=inside_BC, other=float("-inf"))


@triton.jit
def _total(values_BC: tl.tensor) -> tl.tensor:
    return tl.sum(tl.sum(values_BC, axis=1).to(tl.float64), axis=0)


@triton.jit
def _sums_above(
    logits_ptr: tl.tensor,
    list_ptr: tl.tensor,
    max_N: tl.tensor,
    t0: tl.tensor,
    t1: tl.tensor,
    t2: tl.tensor,
    t3: tl.tensor,
    maximum: tl.tensor,
    scale: tl.tensor,
    vocab: tl.int32,
    COUNT: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Number (COUNT) or weight of the logits above each of t0 <= t1 <= t2 <= t3; float64."""
    num = list_chunks(list_ptr, max_N > t0, N)
    sum_0 = tl.zeros([B, C], tl.float32)
    sum_1 = tl.zeros([B, C], tl.float32)
    sum_2 = tl.zeros([B, C], tl.float32)
    sum_3 = tl.zeros([B, C], tl.float32)
    index_B = tl.arange(0, B)
    raw_BC = load_chunks(logits_ptr, list_ptr, index_B, num, vocab, C)
    for start in range(B, num + B, B):
        logits_BC = raw_BC.to(tl.float32)
        # Under way while this block is weighed: a program has few others to hide the wait.
        raw_BC = load_chunks(logits_ptr, list_ptr, start + index_B, num, vocab, C)
        if COUNT:
            weight_BC = tl.full([B, C], 1.0, tl.float32)
        else:
            weight_BC = weight_of(logits_BC, maximum, scale)
        sum_0 += tl.where(logits_BC > t0, weight_BC, 0.0)
        sum_1 += tl.where(logits_BC > t1, weight_BC, 0.0)
        sum_2 += tl.where(logits_BC > t2, weight_BC, 0.0)
        sum_3 += tl.where(logits_BC > t3, weight_BC, 0.0)
    return _total(sum_0), _total(sum_1), _total(sum_2), _total(sum_3)


@triton.jit
def _narrow(
    low: tl.tensor,
    high: tl.tensor,
    above: tl.tensor,
    key: tl.tensor,
    key_above: tl.tensor,
    target: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The bracket after a look at `key`, above which there is `key_above`."""
    too_high = key_above < target
    closer = too_high & (key < high)
    low = tl.where(too_high, low, tl.maximum(low, key))
    high = tl.where(closer, key, high)
    return low, high, tl.where(closer, key_above, above)


@triton.jit
def _find_cut(
    logits_ptr: tl.tensor,
    list_ptr: tl.tensor,
    max_N: tl.tensor,
    low: tl.tensor,
    maximum: tl.tensor,
    scale: tl.tensor,
    target: tl.tensor,
    vocab: tl.int32,
    COUNT: tl.constexpr,
    SHIFT: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Key of the largest logit such that it and all above make up `target`, and what those
    above it make up (number or weight, float64). low: a key the cut is known to be above."""
    high = _key(maximum, SHIFT)
    above = target * 0
    while high - low > 1:
        width = high - low
        k0 = low + tl.maximum(width // 5, 1)
        k1 = low + tl.maximum(width * 2 // 5, 1)
        k2 = low + tl.maximum(width * 3 // 5, 1)
        k3 = low + tl.maximum(width * 4 // 5, 1)
        a0, a1, a2, a3 = _sums_above(
            logits_ptr,
            list_ptr,
            max_N,
            _value(k0, SHIFT),
            _value(k1, SHIFT),
            _value(k2, SHIFT),
            _value(k3, SHIFT),
            maximum,
            scale,
            vocab,
            COUNT,
            B,
            C,
            N,
        )
        low, high, above = _narrow(low, high, above, k0, a0, target)
        low, high, above = _narrow(low, high, above, k1, a1, target)
        low, high, above = _narrow(low, high, above, k2, a2, target)
        low, high, above = _narrow(low, high, above, k3, a3, target)
    return high, above


@triton.jit
def _kth_largest(
    max_N: tl.tensor, k: tl.tensor, least: tl.tensor, SHIFT: tl.constexpr
) -> tl.tensor:
    """Key of the k-th largest of the values; above `least`."""
    key_N = _key(max_N, SHIFT)
    low, high = least, tl.max(key_N, axis=0)
    while high - low > 1:
        middle = (low + high) >> 1
        enough = tl.sum((key_N > middle).to(tl.int32), axis=0) >= k
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    return high


@triton.jit
def _top_k_cut(
    logits_ptr: tl.tensor,
    list_ptr: tl.tensor,
    max_N: tl.tensor,
    maximum: tl.tensor,
    top_k: tl.tensor,
    vocab: tl.int32,
    num_chunks: tl.int32,
    SHIFT: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Key of the k-th largest logit, and how many equal to it are kept."""
    low = _least_key(SHIFT) - 1
    if top_k <= num_chunks:
        low = _kth_largest(max_N, top_k, low, SHIFT) - 1
    cut, above = _find_cut(
        logits_ptr,
        list_ptr,
        max_N,
        low,
        maximum,
        maximum,
        top_k.to(tl.float64),
        vocab,
        True,
        SHIFT,
        B,
        C,
        N,
    )
    return cut, top_k - above.to(tl.int64)


@triton.jit
def _least_top_p_key(
    maximum: tl.tensor,
    divisor: tl.tensor,
    top_p: tl.tensor,
    total: tl.tensor,
    vocab: tl.int32,
    SHIFT: tl.constexpr,
) -> tl.tensor:
    """A key below any top-p cut: V tokens that far down weigh less than what may be left out."""
    depth = (
        tl.log(tl.full([], 0.0, tl.float64) + vocab) - tl.log((1 - top_p) * total)
    ) * 1.001 + 0.001
    least = maximum - (tl.maximum(depth, 0.0) * divisor.to(tl.float64)).to(tl.float32)
    return _key(least, SHIFT) - 1


@triton.jit
def cut_of_row(
    logits_ptr: tl.tensor,
    list_ptr: tl.tensor,
    max_N: tl.tensor,
    maximum: tl.tensor,
    divisor: tl.tensor,
    total: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    vocab: tl.int32,
    num_chunks: tl.int32,
    SHIFT: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The smallest logit that top-k and top-p keep, and how many equal to it."""
    scale = scale_of(divisor)
    cut = _least_key(SHIFT)
    room = top_k * 0 + vocab
    limited = (top_k > 0) & (top_k < vocab)
    if limited:
        cut, room = _top_k_cut(
            logits_ptr, list_ptr, max_N, maximum, top_k, vocab, num_chunks, SHIFT, B, C, N
        )
    if top_p < 1:
        low = cut - 1
        if limited:
            value = _value(cut, SHIFT)
            total, _, _, _ = _sums_above(
                logits_ptr,
                list_ptr,
                max_N,
                value,
                value,
                value,
                value,
                maximum,
                scale,
                vocab,
                False,
                B,
                C,
                N,
            )
            total += room.to(tl.float64) * weight_of(value, maximum, scale).to(tl.float64)
        else:
            low = tl.maximum(low, _least_top_p_key(maximum, divisor, top_p, total, vocab, SHIFT))
        target = top_p * total
        former, most = cut, room
        cut, above = _find_cut(
            logits_ptr,
            list_ptr,
            max_N,
            low,
            maximum,
            scale,
            target,
            vocab,
            False,
            SHIFT,
            B,
            C,
            N,
        )
        weight = weight_of(_value(cut, SHIFT), maximum, scale).to(tl.float64)
        missing = tl.ceil((target - above) / weight)
        most_missing = tl.full([], 0.0, tl.float64) + vocab
        room = tl.minimum(tl.maximum(missing, 1.0), most_missing).to(tl.int64)
        room = tl.where(cut == former, tl.minimum(room, most), room)
    return _value(cut, SHIFT), room
