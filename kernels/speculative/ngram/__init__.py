"""Drafts copied from text that went on from the same tokens: n-gram, or prompt lookup, decoding.

Shapes: R rows, K most drafts of a row, M sources of a slot, H tokens of the history.

The last tokens of a sequence are looked for in its own earlier text (prompt lookup decoding, Apoorv
Saxena, https://github.com/apoorvumang/prompt-lookup-decoding) and in other sequences: samples
of the same prompt and earlier ones, as SuffixDecoding (arXiv 2411.04975) does with a suffix tree.
Here every source is read through at every step, which a GPU does faster than it would keep a
tree, and which always sees what the other rows have just sampled.
"""

from __future__ import annotations

import torch

from kernels.backend import KernelBackend, unknown_backend
from kernels.speculative.ngram import reference

__all__ = ["propose"]


def propose(
    slots_R: torch.Tensor,
    draft_lens_R: torch.Tensor,
    *,
    length: torch.Tensor,
    limit: torch.Tensor,
    forced: torch.Tensor,
    token_ids: torch.Tensor,
    sources: torch.Tensor,
    history: torch.Tensor,
    segments: torch.Tensor,
    drafts_RK: torch.Tensor,
    drafted_R: torch.Tensor,
    max_match: int = 16,
    min_match: int = 2,
    backend: KernelBackend,
) -> None:
    """Draft up to draft_lens_R[r] tokens for row r, into `drafts_RK` and `drafted_R`.

    slots_R: int32. draft_lens_R: int32, K and more count as K. length, limit: int32 [slots];
    token_ids: int32 [slots, context], contiguous, ids of 0 and more; see `kernels.speculative`.
    sources: int32 [slots, M], contiguous: where drafts of a slot may be copied from beside its own
    text. An entry s >= 0 is slot s, whose tokens so far are read; -2 - s is segment s of the
    history; -1, and the slot itself, are nothing. history: int32 [H]. segments: int32
    [number of segments, 2], contiguous: where each begins in the history, and its size.
    forced: float32 [slots], as in `kernels.speculative.accept`. drafts_RK, drafted_R: int32,
    filled, the first contiguous; behind a row's drafts are zeros.

    A match of a source is a place of it that `min_match` (1 or more) to `max_match` last tokens of
    the row precede and a token follows. Of each source its longest match counts, of those the
    latest. Of the sources those with the longest match are asked: the token that follows most of
    these matches wins, and of the sources that go on with it the first, a row's own text being
    before all others. The drafts are what follows there: as many as the row asked for, the source
    has, and its sequence may grow by after the token that any step brings; none without a match.
    A row whose acceptance is forced is given what it asked for, with zeros for what is not found.

    Raises ValueError if not 1 <= min_match <= max_match, and on an unknown backend.
    """
    if not 1 <= min_match <= max_match:
        raise ValueError(
            f"min_match must be from 1 to max_match ({max_match}); got min_match {min_match}"
        )
    tables = length, limit, forced, token_ids, sources, history, segments
    if backend == "torch":
        reference.propose(
            slots_R, draft_lens_R, *tables, drafts_RK, drafted_R, max_match, min_match
        )
    elif backend == "triton":
        from kernels.speculative.ngram import triton

        triton.propose(slots_R, draft_lens_R, *tables, drafts_RK, drafted_R, max_match, min_match)
    else:
        raise unknown_backend(backend)
