"""N-gram drafts on a CPU, which drafts by it too: numpy, whose many small calls cost less.

Shapes: R rows that may draft, K most drafts of a row, S sources of a row with its own text the
first, T distinct texts among them, N tokens of these, Y pairs of a text and a row that reads it,
P places in texts with a row whose last tokens end there, W last tokens that a match may have.

Rows of a prompt share their sources, so each distinct text is taken once, and compared with the
last one or two tokens of all rows that read it. Few places are left to be looked at further.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

Array = np.ndarray
_BETWEEN, _BEFORE = -1, -2
"""What stands between texts, and before the first token of a row: neither equals anything."""
_AT_BITS = 32
"""A match is one number, its length above its place, so that the largest is the best."""


class _Texts(NamedTuple):
    """tokens_N: all texts, with something else before and behind each, and twice before the first.
    start_T, stop_T: where they lie there. of_RS: which of them each source is."""

    tokens_N: Array
    start_T: Array
    stop_T: Array
    of_RS: Array


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
    num_drafts, context = drafts_RK.shape[1], token_ids.shape[1]
    drafts_RK.zero_()
    slots = slots_R.long()
    known, left = length[slots], limit[slots].clamp(max=context + 1) - length[slots]
    most = torch.minimum(draft_lens_R, left - 1).clamp(0, num_drafts)
    drafted_R.copy_(torch.where(known > 0, most, 0))
    if not bool((drafted_R > 0).any()):
        return
    rows = (drafted_R > 0).nonzero()[:, 0]
    tables = _host(token_ids), _host(length), _host(history), _host(segments)
    own, asked = _host(slots[rows]), _host(drafted_R[rows])
    texts = _gather_texts(own, _host(sources[slots[rows]]), *tables)
    suffix_RW = _suffixes(tables[0], own, _host(known[rows]), max_match)
    best_RT = _best_matches(texts, suffix_RW, min(min_match, 2))
    found, drafts = _chosen(texts, best_RT, min_match, asked, num_drafts)
    drafts_RK[rows] = torch.from_numpy(drafts).to(drafts_RK.device)
    given = torch.from_numpy(found).to(drafted_R.device)
    drafted_R[rows] = torch.where(forced[slots[rows]] >= 0, drafted_R[rows], given)


def _host(tensor: torch.Tensor) -> Array:
    return tensor.cpu().numpy()


def _gather_texts(
    own_R: Array,
    sources_RM: Array,
    token_ids: Array,
    length: Array,
    history: Array,
    segments: Array,
) -> _Texts:
    others_RM = np.where(sources_RM == own_R[:, None], -1, sources_RM)
    ids_RS = np.concatenate((own_R[:, None], others_RM), axis=1)
    ids, of_RS = np.unique(ids_RS, return_inverse=True)
    views = []
    for source in ids.tolist():
        if source >= 0:
            views.append(token_ids[source, : length[source]])
        elif source == -1:
            views.append(history[:0])
        else:
            at, size = segments[-2 - source]
            views.append(history[at : at + size])
    size_T = np.array([len(view) for view in views])
    stop_T = np.cumsum(size_T + 1) + 1
    start_T = stop_T - size_T
    tokens_N = np.full(stop_T[-1] + 1, _BETWEEN, dtype=np.int32)
    for start, stop, view in zip(start_T.tolist(), stop_T.tolist(), views, strict=True):
        tokens_N[start:stop] = view
    return _Texts(tokens_N, start_T, stop_T, of_RS.reshape(ids_RS.shape))


def _suffixes(token_ids: Array, own_R: Array, known_R: Array, width: int) -> Array:
    """The last `width` tokens of each row, the newest first."""
    at_RW = known_R[:, None] - 1 - np.arange(width)
    tokens_RW = token_ids[own_R[:, None], np.maximum(at_RW, 0)]
    return np.where(at_RW >= 0, tokens_RW, _BEFORE)


def _best_matches(texts: _Texts, suffix_RW: Array, sure: int) -> Array:
    """Best match of each row in each text, 0 for none; sure: tokens it has to have, 1 or 2."""
    best_RT = np.zeros((len(suffix_RW), len(texts.start_T)), dtype=np.int64)
    row_P, at_P, text_P = _places(texts, suffix_RW, sure)
    pair_P = row_P * best_RT.shape[1] + text_P
    # The latest places first: in text that repeats itself every other one is then settled.
    latest = np.full(best_RT.size, -1)
    latest[pair_P] = np.arange(len(pair_P))
    latest = latest[latest >= 0]
    best = best_RT.reshape(-1)
    best[pair_P[latest]] = _matches(texts.tokens_N, suffix_RW, row_P[latest], at_P[latest], sure)
    open_P = (best >> _AT_BITS)[pair_P] < suffix_RW.shape[1]
    open_P[latest] = False
    others = _matches(texts.tokens_N, suffix_RW, row_P[open_P], at_P[open_P], sure)
    np.maximum.at(best, pair_P[open_P], others)
    return best_RT


def _places(texts: _Texts, suffix_RW: Array, sure: int) -> tuple[Array, Array, Array]:
    """Every (row, place, text) where the last `sure` tokens of the row end at that place of one of
    its texts, with a token behind them; the places of a row and a text ascend."""
    tokens_N, start_T, stop_T = texts.tokens_N, texts.start_T, texts.stop_T
    newest_R, before_R = suffix_RW[:, 0], suffix_RW[:, sure - 1]
    is_source_TR = np.zeros((len(start_T), len(suffix_RW)), dtype=bool)
    np.put_along_axis(is_source_TR, texts.of_RS.T, True, axis=0)
    text_Y, row_Y = is_source_TR.nonzero()
    bound_T1 = np.searchsorted(text_Y, np.arange(len(start_T) + 1))
    # 16 bits of each pair of tokens, at the place of its first: quick to compare, rarely wrong.
    hash_N = _hash(tokens_N[: len(tokens_N) + 1 - sure], tokens_N[sure - 1 :])
    hash_Y1 = _hash(before_R, newest_R)[row_Y][:, None]
    bounds = zip(start_T + 1 - sure, stop_T - sure, bound_T1[:-1], bound_T1[1:], strict=True)
    found = [np.flatnonzero(hash_N[a:b] == hash_Y1[c:d]) for a, b, c, d in bounds]
    text_P = np.repeat(np.arange(len(found)), [len(flat) for flat in found])
    nth_P, place_P = np.divmod(np.concatenate(found), (stop_T - start_T - 1)[text_P])
    row_P, at_P = row_Y[bound_T1[text_P] + nth_P], start_T[text_P] + place_P
    same_P = tokens_N[at_P] == newest_R[row_P]
    same_P &= tokens_N[at_P - sure + 1] == before_R[row_P]
    return row_P[same_P], at_P[same_P], text_P[same_P]


def _hash(before: Array, newest: Array) -> Array:
    return before.astype(np.uint16) * np.uint16(40503) + newest.astype(np.uint16)


def _matches(tokens_N: Array, suffix_RW: Array, row_P: Array, at_P: Array, sure: int) -> Array:
    """The match at each place, whose first `sure` tokens are known to be equal."""
    length_P = np.full(len(at_P), sure, dtype=np.int64)
    alive, row, at = np.arange(len(at_P)), row_P, at_P
    for back in range(sure, suffix_RW.shape[1]):
        same = tokens_N[at - back] == suffix_RW[row, back]
        alive, row, at = alive[same], row[same], at[same]
        if not len(alive):
            break
        length_P[alive] += 1
    return length_P << _AT_BITS | at_P


def _chosen(
    texts: _Texts, best_RT: Array, min_match: int, asked_R: Array, num_drafts: int
) -> tuple[Array, Array]:
    """How many drafts each row gets, and which, [R, K]."""
    rows = np.arange(len(best_RT))
    match_RS = best_RT[rows[:, None], texts.of_RS]
    length_RS, at_RS = match_RS >> _AT_BITS, match_RS & ((1 << _AT_BITS) - 1)
    longest_R = length_RS.max(axis=1)
    tied_RS = length_RS == longest_R[:, None]
    next_RS = texts.tokens_N[at_RS + 1]
    same_RSS = next_RS[:, :, None] == next_RS[:, None, :]
    votes_RS = (same_RSS & tied_RS[:, None, :]).sum(axis=2)
    choice_R = np.where(tied_RS, votes_RS, 0).argmax(axis=1)
    first_R = at_RS[rows, choice_R] + 1
    stop_R = texts.stop_T[texts.of_RS[rows, choice_R]]
    found_R = np.where(longest_R >= min_match, np.minimum(asked_R, stop_R - first_R), 0)
    nth_K = np.arange(num_drafts)
    at_RK = np.minimum(first_R[:, None] + nth_K, len(texts.tokens_N) - 1)
    drafts_RK = np.where(nth_K < found_R[:, None], texts.tokens_N[at_RK], 0)
    return found_R.astype(np.int32), drafts_RK.astype(np.int32)
