"""Experts in plain torch.

T tokens, K experts of a token, H hidden width, I inner width, J = 2 I; S slots for experts on this
rank, P = T K pairs of a token and an expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.activation import reference as activation


def run_experts(
    x_TH: torch.Tensor,
    gate_up_SJH: torch.Tensor,
    down_SHI: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    first_slot: int = 0,
    added_TH: torch.Tensor | None = None,
    residual_TH: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `kernels.moe.run_experts`. Waits for the device, once."""
    slots_TK = ids_TK.long() - first_slot
    held_TK = (slots_TK >= 0) & (slots_TK < len(down_SHI))
    slots_P = slots_TK.where(held_TK, len(down_SHI)).flatten()
    pairs_P = slots_P.argsort(stable=True)
    counts = slots_P.bincount(minlength=len(down_SHI) + 1)[:-1].tolist()
    down_PH = x_TH.new_zeros(len(slots_P), x_TH.shape[1])
    top_k = ids_TK.shape[1]
    for slot, pairs in enumerate(pairs_P[: sum(counts)].split(counts)):
        if len(pairs):
            gate_up = F.linear(x_TH[pairs // top_k], gate_up_SJH[slot])
            down_PH[pairs] = F.linear(activation.silu_mul(gate_up), down_SHI[slot])
    weights_TK = weights_TK.masked_fill(~held_TK, 0.0)
    weighted_TKH = down_PH.view(*ids_TK.shape, x_TH.shape[1]) * weights_TK[:, :, None]
    sum_TH = x_TH.new_zeros(x_TH.shape, dtype=torch.float32)
    for place in range(top_k):
        sum_TH = sum_TH + weighted_TKH[:, place].float()
    out_TH = sum_TH.to(x_TH.dtype)
    if added_TH is not None:
        out_TH = out_TH + added_TH
    return out_TH if residual_TH is None else residual_TH + out_TH
