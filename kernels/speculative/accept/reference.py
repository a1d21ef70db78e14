"""Acceptance in plain torch. R rows, K drafts of a row, J = K + 1, V = R * J."""

from __future__ import annotations

import torch

from kernels.sampling import philox_uniform

FORCED_SEED = 0x666F72636564
"""With the slot, the seed of what is accepted by force: no request's own."""


def accept(
    tokens_V: torch.Tensor,
    slots_R: torch.Tensor,
    drafts_RK: torch.Tensor,
    drafted_R: torch.Tensor,
    length: torch.Tensor,
    limit: torch.Tensor,
    forced: torch.Tensor,
    token_ids: torch.Tensor,
    counts_R: torch.Tensor,
) -> None:
    """See `kernels.speculative.accept.accept`."""
    (num_rows, num_drafts), context = drafts_RK.shape, token_ids.shape[1]
    tokens_RJ = tokens_V.view(num_rows, num_drafts + 1)
    slots_R = slots_R.long()
    length_R = length[slots_R].long()
    left_R = limit[slots_R].clamp(max=context + 1) - length_R

    hit_RK = drafts_RK == tokens_RJ[:, :num_drafts]
    forced_R = forced[slots_R]
    if num_drafts and bool((forced_R >= 0).any()):
        drawn_RK = _forced_hits(slots_R, length_R, forced_R, num_drafts)
        hit_RK = torch.where(forced_R[:, None] >= 0, drawn_RK, hit_RK)
    step_J = torch.arange(num_drafts + 1, device=tokens_V.device)
    hit_RK = hit_RK & (step_J[:num_drafts] < drafted_R[:, None])
    accepted_R = hit_RK.long().cumprod(dim=1).sum(dim=1)
    runs_R = (length_R > 0) & (left_R > 0)
    count_R = torch.where(runs_R, torch.minimum(accepted_R + 1, left_R), 0)

    at_RJ = length_R[:, None] + step_J
    row, step = ((step_J < count_R[:, None]) & (at_RJ < context)).nonzero().unbind(1)
    token_ids[slots_R[row], at_RJ[row, step]] = tokens_RJ[row, step].to(torch.int32)
    length[slots_R] = (length_R + count_R).to(torch.int32)
    counts_R.copy_(count_R)


def _forced_hits(
    slots_R: torch.Tensor, length_R: torch.Tensor, forced_R: torch.Tensor, num_drafts: int
) -> torch.Tensor:
    nth_K = torch.arange(1, num_drafts + 1, device=slots_R.device)
    position_RK = length_R[:, None] + nth_K
    seed_RK = (slots_R ^ FORCED_SEED)[:, None].expand_as(position_RK)
    return philox_uniform(seed_RK, position_RK) < forced_R[:, None].double()
