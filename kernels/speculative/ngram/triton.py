"""N-gram drafts on GPU: programs read the sources through, then one a row chooses.

Shapes: R rows, K most drafts of a row, M sources of a slot, S = M + 1 with its own text the first,
P programs that share a source.

A match is one number, its length above the place of its last token, so that the largest is the
best; 0 is none. Which program reads what changes no result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_AT_BITS = tl.constexpr(32)
_BLOCK, _WARPS = 1024, 4
"""Tokens that a program reads at a time, and its warps."""
_PROGRAMS, _MOST_SHARES = 4096, 16
"""Programs that fill a large GPU, and most of them for one source; both powers of two."""


@triton.jit
def _asked(
    row: tl.tensor,
    slot: tl.tensor,
    draft_lens_ptr: tl.tensor,
    length_ptr: tl.tensor,
    limit_ptr: tl.tensor,
    context: tl.int32,
    K: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Tokens known of a row, and drafts that it asks for and has room for."""
    known = tl.load(length_ptr + slot)
    left = tl.minimum(tl.load(limit_ptr + slot), context + 1) - known
    most = tl.minimum(tl.load(draft_lens_ptr + row), tl.minimum(left - 1, K))
    return known, tl.where(known > 0, tl.maximum(most, 0), 0)


@triton.jit
def _text(
    column: tl.tensor,
    slot: tl.tensor,
    length_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    sources_ptr: tl.tensor,
    history_ptr: tl.tensor,
    segments_ptr: tl.tensor,
    context: tl.int32,
    M: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Pointer to and size of a source of `slot`, or of several; column 0 is its own text."""
    is_listed = (column > 0) & (column <= M)
    listed = tl.load(sources_ptr + slot * M + column - 1, mask=is_listed, other=-1).to(tl.int64)
    source = tl.where(column == 0, slot, tl.where(listed == slot, -1, listed))
    is_slot, is_segment = source >= 0, source < -1
    place = tl.where(is_slot, source, 0)
    segment = tl.where(is_segment, -2 - source, 0)
    known = tl.load(length_ptr + place, mask=is_slot, other=0)
    size = tl.load(segments_ptr + 2 * segment + 1, mask=is_segment, other=0)
    at = tl.load(segments_ptr + 2 * segment, mask=is_segment, other=0)
    text_ptr = tl.where(is_segment, history_ptr + at, token_ids_ptr + place * context)
    return text_ptr, tl.where(is_segment, size, tl.minimum(known, context))


@triton.jit
def _match_kernel(
    slots_ptr: tl.tensor,
    draft_lens_ptr: tl.tensor,
    length_ptr: tl.tensor,
    limit_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    sources_ptr: tl.tensor,
    history_ptr: tl.tensor,
    segments_ptr: tl.tensor,
    matches_ptr: tl.tensor,
    context: tl.int32,
    MAX_MATCH: tl.constexpr,
    MIN_MATCH: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """matches_ptr: int64 [R, S, P], the best match that each program saw."""
    row, column, share = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    known, asked = _asked(row, slot, draft_lens_ptr, length_ptr, limit_ptr, context, K)
    text_ptr, size = _text(
        column,
        slot,
        length_ptr,
        token_ids_ptr,
        sources_ptr,
        history_ptr,
        segments_ptr,
        context,
        M,
    )
    # A match needs a token behind it.
    stop = tl.where(asked > 0, size - 1, 0)
    newest_ptr = token_ids_ptr + slot * context + known - 1
    newest = tl.load(newest_ptr, mask=asked > 0, other=-2)
    before = tl.load(newest_ptr - 1, mask=(asked > 0) & (known > 1), other=-2)
    best = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(share * BLOCK, stop, P * BLOCK):
        at = start + tl.arange(0, BLOCK)
        hit = tl.load(text_ptr + at, mask=at < stop, other=-1) == newest
        if MIN_MATCH > 1:
            inside = (at > 0) & (at < stop)
            hit = hit & (tl.load(text_ptr + at - 1, mask=inside, other=-1) == before)
        if tl.max(hit.to(tl.int32), axis=0) > 0:
            length = hit.to(tl.int64)
            same = hit
            for back in tl.static_range(1, MAX_MATCH):
                wanted = tl.load(newest_ptr - back, mask=known > back, other=-2)
                inside = hit & (at >= back)
                same = same & (tl.load(text_ptr + at - back, mask=inside, other=-1) == wanted)
                length += same.to(tl.int64)
            match = tl.where(length >= MIN_MATCH, (length << _AT_BITS) | at, 0)
            best = tl.maximum(best, match)
    offset = (row * (M + 1) + column) * P + share
    tl.store(matches_ptr + offset, tl.max(best, axis=0))


@triton.jit
def _choose_kernel(
    slots_ptr: tl.tensor,
    draft_lens_ptr: tl.tensor,
    length_ptr: tl.tensor,
    limit_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    sources_ptr: tl.tensor,
    history_ptr: tl.tensor,
    segments_ptr: tl.tensor,
    matches_ptr: tl.tensor,
    forced_ptr: tl.tensor,
    drafts_ptr: tl.tensor,
    drafted_ptr: tl.tensor,
    context: tl.int32,
    K: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    _, asked = _asked(row, slot, draft_lens_ptr, length_ptr, limit_ptr, context, K)
    column_S = tl.arange(0, BLOCK_S)
    offset_SP = (row * (M + 1) + column_S)[:, None] * P + tl.arange(0, P)[None, :]
    matches_SP = tl.load(matches_ptr + offset_SP, mask=(column_S <= M)[:, None], other=0)
    match_S = tl.max(matches_SP, axis=1)
    length_S, at_S = match_S >> _AT_BITS, match_S & 0xFFFFFFFF
    longest = tl.max(length_S, axis=0)
    tied_S = (length_S == longest) & (longest > 0)
    text_ptr_S, _ = _text(
        column_S,
        slot,
        length_ptr,
        token_ids_ptr,
        sources_ptr,
        history_ptr,
        segments_ptr,
        context,
        M,
    )
    # A token of its own for what is not tied: it votes for nobody.
    next_S = tl.load(text_ptr_S + at_S + 1, mask=tied_S, other=-1)
    votes_S = tl.sum((next_S[:, None] == next_S[None, :]).to(tl.int32), axis=1)
    votes_S = tl.where(tied_S, votes_S, 0)
    choice = tl.min(tl.where(votes_S == tl.max(votes_S, axis=0), column_S, BLOCK_S), axis=0)
    at = tl.sum(tl.where(column_S == choice, at_S, 0), axis=0)
    text_ptr, size = _text(
        choice,
        slot,
        length_ptr,
        token_ids_ptr,
        sources_ptr,
        history_ptr,
        segments_ptr,
        context,
        M,
    )
    found = tl.where(longest > 0, tl.minimum(asked, (size - at - 1).to(tl.int32)), 0)
    nth = tl.arange(0, BLOCK_K)
    drafts = tl.load(text_ptr + at + 1 + nth, mask=nth < found, other=0)
    tl.store(drafts_ptr + row * K + nth, drafts, mask=nth < K)
    is_forced = tl.load(forced_ptr + slot) >= 0
    tl.store(drafted_ptr + row, tl.where(is_forced, asked, found))


def propose(
    slots_R: torch.Tensor,
    draft_lens_R: torch.Tensor,
    length: torch.Tensor,
    limit: torch.Tensor,
    forced: torch.Tensor,
    token_ids: torch.Tensor,
    sources: torch.Tensor,
    history: torch.Tensor,
    segments: torch.Tensor,
    drafts_RK: torch.Tensor,
    drafted_R: torch.Tensor,
    max_match: int,
    min_match: int,
) -> None:
    """See `kernels.speculative.ngram.propose`."""
    assert token_ids.is_contiguous() and sources.is_contiguous() and segments.is_contiguous()
    assert drafts_RK.is_contiguous()
    (num_rows, num_drafts), num_sources = drafts_RK.shape, sources.shape[1]
    if num_rows == 0 or num_drafts == 0:
        drafted_R.zero_()
        return
    shares = _shares(num_rows * (num_sources + 1))
    shape = num_rows, num_sources + 1, shares
    matches = torch.empty(shape, dtype=torch.int64, device=drafts_RK.device)
    tables = (length, limit, token_ids, sources, history, segments)
    _match_kernel[shape](
        slots_R,
        draft_lens_R,
        *tables,
        matches,
        token_ids.shape[1],
        MAX_MATCH=max_match,
        MIN_MATCH=min_match,
        K=num_drafts,
        M=num_sources,
        P=shares,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    _choose_kernel[(num_rows,)](
        slots_R,
        draft_lens_R,
        *tables,
        matches,
        forced,
        drafts_RK,
        drafted_R,
        token_ids.shape[1],
        K=num_drafts,
        M=num_sources,
        P=shares,
        BLOCK_S=triton.next_power_of_2(num_sources + 1),
        BLOCK_K=triton.next_power_of_2(num_drafts),
        num_warps=1,
    )


def _shares(num_texts: int) -> int:
    """Programs for each text: few texts are read by more of them."""
    return min(_MOST_SHARES, triton.next_power_of_2(max(_PROGRAMS // num_texts, 1)))
