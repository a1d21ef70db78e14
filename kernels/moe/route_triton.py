"""Routing on GPU: a product, then a program a token; no call waits for the device.

T tokens, H hidden width, N experts, K experts of a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.moe.plan import Logits, choose_logits
from kernels.moe.router import logits_kernel, top_experts_kernel
from kernels.moe.types import Routed
from kernels.routing import RoutingRule

_TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def route(
    x_TH: torch.Tensor,
    gate_NH: torch.Tensor,
    rule: RoutingRule,
    bias_N: torch.Tensor | None = None,
    num_rows: torch.Tensor | None = None,
) -> Routed:
    """See `kernels.moe.route`."""
    rows = len(x_TH)
    ids_TK = x_TH.new_empty(rows, rule.top_k, dtype=torch.int32)
    weights_dtype = x_TH.dtype if rule.rounded_weights else torch.float32
    weights_TK = x_TH.new_empty(rows, rule.top_k, dtype=weights_dtype)
    if not rows:
        return Routed(ids_TK, weights_TK)
    parts = logits_parts(x_TH, gate_NH, choose_logits(rows))
    grouped = rule.group_score != "none"
    groups = rule.num_groups if grouped else 1
    top_experts_kernel[(rows,)](
        parts,
        _or(bias_N, parts),
        _or(num_rows, ids_TK),
        ids_TK,
        weights_TK,
        rows,
        len(parts),
        rule.scale,
        N=rule.num_experts,
        TOP_K=rule.top_k,
        GROUPS=groups,
        TOP_GROUPS=rule.top_groups if grouped else 0,
        TWO=rule.group_score == "top2_sum",
        SIGMOID=rule.score == "sigmoid",
        NORMALISED=rule.normalised,
        BIAS=bias_N is not None,
        FILLED=num_rows is not None,
        ROUND_LOGITS=not rule.wide_logits,
        DTYPE=_TL_DTYPES[x_TH.dtype],
        BLOCK_G=triton.next_power_of_2(groups),
        BLOCK_M=triton.next_power_of_2(rule.num_experts // groups),
        BLOCK_K=triton.next_power_of_2(rule.top_k),
        num_warps=1,
    )
    return Routed(ids_TK, weights_TK)


def logits_parts(x_TH: torch.Tensor, gate_NH: torch.Tensor, config: Logits) -> torch.Tensor:
    """The router's product as float32 [parts, T, N], to be added up in their order."""
    assert x_TH.stride(1) == 1 and gate_NH.is_contiguous() and x_TH.dtype == gate_NH.dtype
    rows, hidden = x_TH.shape
    experts = len(gate_NH)
    num_parts = triton.cdiv(hidden, config.part) if config.apart else 1
    parts = x_TH.new_empty(num_parts, rows, experts, dtype=torch.float32)
    grid = (triton.cdiv(rows, config.block_t), triton.cdiv(experts, config.block_n), num_parts)
    logits_kernel[grid](
        x_TH,
        gate_NH,
        parts,
        x_TH.stride(0),
        rows,
        N=experts,
        H=hidden,
        PART=config.part,
        APART=config.apart,
        BLOCK_T=config.block_t,
        BLOCK_N=config.block_n,
        BLOCK_H=config.block_i,
        num_warps=config.warps,
    )
    return parts


def _or(tensor: torch.Tensor | None, unused: torch.Tensor) -> torch.Tensor:
    """A pointer that the kernel does not follow where there is no tensor."""
    return unused if tensor is None else tensor
