"""Which tokens top-k, nucleus (Holtzman et al., 2020) and min-p (Nguyen et al., 2024) leave.

Shapes: F rows, V vocabulary, C likeliest tokens looked at, S rows of the batch.

top_k keeps the k likeliest tokens. top_p keeps the smallest set of likeliest tokens whose
probability, among those top_k left, reaches p. min_p drops tokens less likely than min_p
times the likeliest. Equal logits count as ordered by id, lowest first, so that the sets have
the size asked for. The likeliest token always stays.

Only the C likeliest logits of a row are sorted, if they settle its set, and never ids: a set
is its smallest logit and its size, from which the mask follows.
"""

from __future__ import annotations

import torch

Filters = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""top_k, top_p and min_p of each row, or None where no row uses that one."""

CANDIDATES = 512


def filtered_rows(filters: Filters, greedy_S: torch.Tensor) -> torch.Tensor | None:
    """Indices of the rows that use a filter and are not greedy; None if there are none."""
    top_k_S, top_p_S, min_p_S = filters
    if top_k_S is None and top_p_S is None and min_p_S is None:
        return None
    active_S = torch.zeros_like(greedy_S)
    if top_k_S is not None:
        active_S |= top_k_S > 0
    if top_p_S is not None:
        active_S |= top_p_S < 1
    if min_p_S is not None:
        active_S |= min_p_S > 0
    rows_F = (active_S & ~greedy_S).nonzero().squeeze(1)
    return rows_F if rows_F.numel() else None


def keep_mask(
    scaled_FV: torch.Tensor,
    top_k_F: torch.Tensor | None,
    top_p_F: torch.Tensor | None,
    min_p_F: torch.Tensor | None,
) -> torch.Tensor:
    """True where a token may be drawn; bool [F, V].

    scaled_FV: float32 logits over temperature. top_k_F <= 0 or >= V, top_p_F >= 1 and
    min_p_F <= 0 are off, as is None.
    """
    keep_FV = torch.ones_like(scaled_FV, dtype=torch.bool)
    if top_k_F is not None or top_p_F is not None:
        keep_FV = _keep_likeliest(scaled_FV, *_defaults(scaled_FV, top_k_F, top_p_F))
    if min_p_F is not None:
        # p < min_p * p_max, in logarithms: log 0 is -inf and drops nothing.
        floor_F = scaled_FV.amax(-1) + min_p_F.float().clamp(0, 1).log()
        keep_FV &= scaled_FV >= floor_F.unsqueeze(1)
    return keep_FV


def _defaults(
    scaled_FV: torch.Tensor, top_k_F: torch.Tensor | None, top_p_F: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest set size (V where off) and nucleus probability (float64, inf where off)."""
    rows, vocab = scaled_FV.shape
    limit_F = torch.full((rows,), vocab, device=scaled_FV.device)
    if top_k_F is not None:
        limit_F = torch.where(top_k_F > 0, top_k_F, vocab).clamp(max=vocab).long()
    nucleus_F = torch.full((rows,), float("inf"), dtype=torch.float64, device=scaled_FV.device)
    if top_p_F is not None:
        nucleus_F = top_p_F.double().masked_fill(top_p_F >= 1, float("inf"))
    return limit_F, nucleus_F


def _keep_likeliest(
    scaled_FV: torch.Tensor, limit_F: torch.Tensor, nucleus_F: torch.Tensor
) -> torch.Tensor:
    vocab = scaled_FV.shape[1]
    likeliest_FC = scaled_FV.topk(min(CANDIDATES, vocab), dim=-1).values
    lowest_F, size_F, settled_F = _cut(likeliest_FC, scaled_FV, limit_F, nucleus_F)
    rest_F = (~settled_F).nonzero().squeeze(1)
    if rest_F.numel():
        scaled_restV = scaled_FV[rest_F]
        sorted_restV = scaled_restV.sort(dim=-1, descending=True).values
        cut = _cut(sorted_restV, scaled_restV, limit_F[rest_F], nucleus_F[rest_F])
        lowest_F[rest_F], size_F[rest_F] = cut[0], cut[1]
    return _mask_of_cut(scaled_FV, lowest_F.unsqueeze(1), size_F.unsqueeze(1))


def _cut(
    sorted_FC: torch.Tensor, scaled_FV: torch.Tensor, limit_F: torch.Tensor, nucleus_F: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Smallest logit and size of each row's set, and whether C logits settle it."""
    count, vocab = sorted_FC.shape[1], scaled_FV.shape[1]
    rank_C = torch.arange(count, device=sorted_FC.device)
    allowed_FC = rank_C < limit_F.unsqueeze(1)
    weight_FC = (sorted_FC - sorted_FC[:, :1]).exp().double() * allowed_FC
    total_F = (scaled_FV.logsumexp(-1) - sorted_FC[:, 0]).double().exp()
    within_F = limit_F <= count
    total_F = torch.where(within_F, weight_FC.sum(-1), total_F)
    # Weight of all likelier tokens: a set is full once that reaches its share of the total.
    likelier_FC = torch.nn.functional.pad(weight_FC.cumsum(-1)[:, :-1], (1, 0))
    open_FC = likelier_FC < (nucleus_F * total_F).unsqueeze(1)
    size_F = ((open_FC | (rank_C == 0)) & allowed_FC).sum(-1)
    off_F = (limit_F == vocab) & (nucleus_F == float("inf"))
    settled_F = within_F | off_F | ((limit_F == vocab) & (size_F < count))
    lowest_F = sorted_FC.gather(1, (size_F - 1).unsqueeze(1)).squeeze(1)
    lowest_F = lowest_F.masked_fill(off_F, float("-inf"))
    return lowest_F, size_F.masked_fill(off_F, vocab), settled_F


def _mask_of_cut(
    scaled_FV: torch.Tensor, lowest_F1: torch.Tensor, size_F1: torch.Tensor
) -> torch.Tensor:
    above_FV, tied_FV = scaled_FV > lowest_F1, scaled_FV == lowest_F1
    room_F1 = size_F1 - above_FV.sum(-1, keepdim=True)
    crowded_F = (tied_FV.sum(-1, keepdim=True) > room_F1).squeeze(1).nonzero().squeeze(1)
    if crowded_F.numel():
        tied_FV[crowded_F] &= tied_FV[crowded_F].cumsum(-1) <= room_F1[crowded_F]
    return above_FV | tied_FV
