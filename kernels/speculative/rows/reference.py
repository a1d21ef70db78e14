"""Virtual rows in plain torch. R rows, K drafts of a row, J = K + 1, V = R * J."""

from __future__ import annotations

import torch

from kernels.speculative.rows.types import VirtualRows


def virtual_rows(
    slots_R: torch.Tensor,
    drafts_RK: torch.Tensor,
    drafted_R: torch.Tensor,
    length: torch.Tensor,
    limit: torch.Tensor,
    token_ids: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
    scratch_slot: int,
    out: VirtualRows,
) -> None:
    """See `kernels.speculative.rows.virtual_rows`."""
    num_drafts, context = drafts_RK.shape[1], token_ids.shape[1]
    slots_R1 = slots_R.long()[:, None]
    length_R1 = length[slots_R1].long()
    left_R1 = limit[slots_R1].clamp(max=context + 1) - length_R1
    runs_R1 = (length_R1 > 0) & (left_R1 > 0)
    most_R = torch.where(runs_R1, left_R1 - 1, 0).clamp(max=num_drafts)[:, 0]
    drafted_R.copy_(torch.minimum(drafted_R, most_R).clamp(min=0))

    step_J = torch.arange(num_drafts + 1, device=drafts_RK.device)
    valid_RJ = runs_R1 & (step_J <= drafted_R[:, None])
    newest_R1 = token_ids[slots_R1, (length_R1 - 1).clamp(0, context - 1)]
    position_RJ = torch.where(valid_RJ, length_R1 - 1 + step_J, 0)
    slots_RJ = torch.where(valid_RJ, slots_R1, scratch_slot)
    pages_RJ = page_table[slots_RJ, position_RJ // page_size].long()
    inputs_RJ = torch.where(valid_RJ, torch.cat((newest_R1, drafts_RK), dim=1), 0)

    _fill(out.slots_V, slots_RJ)
    _fill(out.kv_lens_V, position_RJ + 1)
    _fill(out.positions_V, position_RJ)
    _fill(out.input_ids_V, inputs_RJ)
    _fill(out.write_slots_V, pages_RJ * page_size + position_RJ % page_size)
    _fill(out.valid_V, valid_RJ)


def _fill(buffer_V: torch.Tensor, values_RJ: torch.Tensor) -> None:
    buffer_V.copy_(values_RJ.reshape(-1))
