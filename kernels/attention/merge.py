"""Joining attention computed over two disjoint sets of keys. T tokens, H heads, D head dim."""

from __future__ import annotations

import torch


def merge_states(
    out_a_THD: torch.Tensor,
    lse_a_TH: torch.Tensor,
    out_b_THD: torch.Tensor,
    lse_b_TH: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two key sets from the attention over each.

    out_*: [T, H, D], each softmax-normalised over its own set; lse_*: float32 [T, H], log of
    the sum of exp(score) over that set, -inf where the set is empty (then its `out` is
    ignored, whatever it holds). Returns (out [T, H, D] in the dtype of out_a, lse float32);
    a token that saw no key in either set gets zeros and -inf. Computed in float32.
    """
    lse_TH = torch.logaddexp(lse_a_TH, lse_b_TH)
    weighted_a = _weighted(out_a_THD, lse_a_TH, lse_TH)
    weighted_b = _weighted(out_b_THD, lse_b_TH, lse_TH)
    return (weighted_a + weighted_b).to(out_a_THD.dtype), lse_TH


def _weighted(out_THD: torch.Tensor, part_TH: torch.Tensor, lse_TH: torch.Tensor) -> torch.Tensor:
    empty_TH1 = (part_TH == float("-inf")).unsqueeze(-1)
    share_TH1 = torch.exp(part_TH - lse_TH).unsqueeze(-1)
    # Selected, not multiplied by zero: an empty set's output may be uninitialised memory.
    return torch.where(empty_TH1, 0.0, out_THD.float() * share_TH1)
