"""Routing on GPU: a product, then a program a token; no call waits for the device.

T tokens, H hidden width, N experts, K experts of a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.moe.normed_router import normed_logits_kernel
from kernels.moe.plan import Logits, choose_logits
from kernels.moe.router import logits_kernel, top_experts_kernel
from kernels.moe.types import Routed
from kernels.norm.triton import rms_norm
from kernels.routing import RoutingRule

_MOST_NORMED = 2
"""Rows that every program of the product normalises again, in place of a kernel before it."""
_TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def route(
    x_TH: torch.Tensor,
    gate_NH: torch.Tensor,
    rule: RoutingRule,
    bias_N: torch.Tensor | None = None,
    num_rows: torch.Tensor | None = None,
) -> Routed:
    """See `kernels.moe.route`."""
    if not len(x_TH):
        return _choose(x_TH, x_TH.new_empty(1, 0, len(gate_NH)), rule, bias_N, num_rows)
    parts_PTN = logits_parts(x_TH, gate_NH, choose_logits(len(x_TH)))
    return _choose(x_TH, parts_PTN, rule, bias_N, num_rows)


def norm_and_route(
    total_TH: torch.Tensor,
    norm_weight_H: torch.Tensor,
    eps: float,
    gate_NH: torch.Tensor,
    rule: RoutingRule,
    bias_N: torch.Tensor | None = None,
    num_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Routed]:
    """See `kernels.moe.norm_and_route`."""
    if not 0 < len(total_TH) <= _MOST_NORMED:
        x_TH = rms_norm(total_TH, norm_weight_H, eps)
        return x_TH, route(x_TH, gate_NH, rule, bias_N, num_rows)
    x_TH, parts_PTN = _normed_logits(total_TH, norm_weight_H, eps, gate_NH)
    return x_TH, _choose(x_TH, parts_PTN, rule, bias_N, num_rows)


def _normed_logits(
    total_TH: torch.Tensor, norm_weight_H: torch.Tensor, eps: float, gate_NH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows normalised [T, H], and their `logits_parts`."""
    assert total_TH.stride(1) == 1 and gate_NH.is_contiguous() and total_TH.dtype == gate_NH.dtype
    (rows, hidden), experts = total_TH.shape, len(gate_NH)
    config = choose_logits(rows)
    assert config.apart and rows <= config.block_t
    x_TH = total_TH.new_empty(rows, hidden)
    num_parts = triton.cdiv(hidden, config.part)
    parts_PTN = total_TH.new_empty(num_parts, rows, experts, dtype=torch.float32)
    normed_logits_kernel[(triton.cdiv(experts, config.block_n), num_parts)](
        total_TH,
        gate_NH,
        parts_PTN,
        norm_weight_H,
        x_TH,
        total_TH.stride(0),
        eps,
        N=experts,
        H=hidden,
        ROWS=rows,
        WIDTH=triton.next_power_of_2(hidden),
        PART=config.part,
        BLOCK_T=config.block_t,
        BLOCK_N=config.block_n,
        BLOCK_H=config.block_i,
        num_warps=config.warps,
    )
    return x_TH, parts_PTN


def _choose(
    x_TH: torch.Tensor,
    parts: torch.Tensor,
    rule: RoutingRule,
    bias_N: torch.Tensor | None,
    num_rows: torch.Tensor | None,
) -> Routed:
    """The experts of every row of x by its logits, float32 [parts, T, N]."""
    rows = len(x_TH)
    ids_TK = x_TH.new_empty(rows, rule.top_k, dtype=torch.int32)
    weights_dtype = x_TH.dtype if rule.rounded_weights else torch.float32
    weights_TK = x_TH.new_empty(rows, rule.top_k, dtype=weights_dtype)
    if not rows:
        return Routed(ids_TK, weights_TK)
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
