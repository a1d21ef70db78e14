"""Routing and experts on GPU. No call waits for the device, and every grid follows from the number
of tokens alone: a graph can hold them.

T tokens, N experts of the model, K experts of a token, H hidden width, I inner width, J = 2 I;
S slots for experts on this rank, P = T K pairs of a token and an expert, M tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.moe.combine import combine_kernel
from kernels.moe.gemv import pair_kernel
from kernels.moe.plan import (
    FEW_PAIRS,
    SORT_BLOCK,
    ByPair,
    ByTile,
    Config,
    Gemv,
    Logits,
    Tile,
    choose,
    choose_logits,
    num_tiles,
)
from kernels.moe.router import logits_kernel, top_experts_kernel
from kernels.moe.sort import count_kernel, place_kernel
from kernels.moe.tiles import tiles_kernel
from kernels.moe.types import Routed
from kernels.routing import RoutingRule

_COMBINE_BLOCK = 1024
_TL_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


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


def run_experts(
    x_TH: torch.Tensor,
    gate_up_SJH: torch.Tensor,
    down_SHI: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    first_slot: int = 0,
    added_TH: torch.Tensor | None = None,
    residual_TH: torch.Tensor | None = None,
    num_experts: int | None = None,
) -> torch.Tensor:
    """See `kernels.moe.run_experts`."""
    slots, hidden, inner = down_SHI.shape
    top_k = ids_TK.shape[1]
    config = choose(len(x_TH), top_k, num_experts or slots, hidden, inner)
    down_PH = products(x_TH, gate_up_SJH, down_SHI, ids_TK, first_slot, config)
    return _combine(down_PH, ids_TK, weights_TK, first_slot, slots, added_TH, residual_TH)


def products(
    x_TH: torch.Tensor,
    gate_up_SJH: torch.Tensor,
    down_SHI: torch.Tensor,
    ids_TK: torch.Tensor,
    first_slot: int,
    config: Config,
) -> torch.Tensor:
    """What every pair's expert gives, [P, H], by a given configuration. Rows of pairs that no slot
    holds are left as they were allocated."""
    assert gate_up_SJH.is_contiguous() and down_SHI.is_contiguous() and ids_TK.is_contiguous()
    assert x_TH.stride(1) == 1
    _, hidden, inner = down_SHI.shape
    pairs = ids_TK.numel()
    inner_PI, down_PH = x_TH.new_empty(pairs, inner), x_TH.new_empty(pairs, hidden)
    if not pairs:
        return down_PH
    if isinstance(config, ByPair):
        _by_pair(x_TH, gate_up_SJH, ids_TK, inner_PI, first_slot, config.up, up=True)
        _by_pair(inner_PI, down_SHI, ids_TK, down_PH, first_slot, config.down, up=False)
        return down_PH
    order = sort(ids_TK, first_slot, len(down_SHI), config.block_p)
    top_k = ids_TK.shape[1]
    _by_tile(x_TH, gate_up_SJH, order, inner_PI, top_k, config, config.up, up=True)
    _by_tile(inner_PI, down_SHI, order, down_PH, top_k, config, config.down, up=False)
    return down_PH


def _by_pair(
    x: torch.Tensor,
    weight: torch.Tensor,
    ids_TK: torch.Tensor,
    out: torch.Tensor,
    first_slot: int,
    config: Gemv,
    *,
    up: bool,
) -> None:
    pairs, outs = out.shape
    ins = x.shape[1]
    pair_kernel[(pairs, triton.cdiv(outs, config.block_o))](
        x,
        weight,
        ids_TK,
        out,
        x.stride(0),
        first_slot,
        SLOTS=len(weight),
        OUT=outs,
        IN=ins,
        TOP_K=ids_TK.shape[1],
        BLOCK_O=config.block_o,
        BLOCK_I=triton.next_power_of_2(ins),
        UP=up,
        num_warps=config.warps,
    )


def sort(
    ids_TK: torch.Tensor, first_slot: int, slots: int, tile: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs that slots hold, in their order, int32 [P], of which what lies behind the last is
    left as allocated; and the tiles of at most `tile` of them, int32 [M, 3]: slot (-1 for none),
    first place, end."""
    pairs = ids_TK.numel()
    block = FEW_PAIRS if pairs <= FEW_PAIRS else SORT_BLOCK
    blocks, warps = triton.cdiv(pairs, block), block // 256
    most = num_tiles(pairs, slots, tile)
    order_P, tiles_M3 = ids_TK.new_empty(pairs), ids_TK.new_empty(most, 3)
    counts = order_P
    if blocks > 1:
        counts = ids_TK.new_empty(blocks, slots)
        count_kernel[(slots, blocks)](
            ids_TK, counts, pairs, first_slot, SLOTS=slots, BLOCK_P=block, num_warps=warps
        )
    place_kernel[(slots, blocks)](
        ids_TK,
        counts,
        order_P,
        tiles_M3,
        pairs,
        first_slot,
        blocks,
        most,
        SLOTS=slots,
        TILE=tile,
        BY_PAIR=most == pairs,
        COUNTED=blocks > 1,
        BLOCK_P=block,
        BLOCK_S=triton.next_power_of_2(slots),
        BLOCK_M=32,
        num_warps=warps,
    )
    return order_P, tiles_M3


def _by_tile(
    x: torch.Tensor,
    weight: torch.Tensor,
    order: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    top_k: int,
    config: ByTile,
    tile: Tile,
    *,
    up: bool,
) -> None:
    order_P, tiles_M3 = order
    outs = out.shape[1]
    tiles_kernel[(triton.cdiv(outs, tile.block_o), len(tiles_M3))](
        x,
        weight,
        order_P,
        tiles_M3,
        out,
        x.stride(0),
        OUT=outs,
        IN=x.shape[1],
        TOP_K=top_k,
        BLOCK_P=config.block_p,
        BLOCK_O=tile.block_o,
        BLOCK_I=tile.block_i,
        STAGES=tile.stages,
        UP=up,
        num_warps=tile.warps,
    )


def _combine(
    down_PH: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    first_slot: int,
    slots: int,
    added_TH: torch.Tensor | None,
    residual_TH: torch.Tensor | None,
) -> torch.Tensor:
    rows, top_k = ids_TK.shape
    hidden = down_PH.shape[1]
    assert weights_TK.is_contiguous()
    out_TH = down_PH.new_empty(rows, hidden)
    if not rows:
        return out_TH
    added, residual = _or(added_TH, out_TH), _or(residual_TH, out_TH)
    assert added.stride(1) == 1 and residual.stride(1) == 1
    block = min(triton.next_power_of_2(hidden), _COMBINE_BLOCK)
    combine_kernel[(rows, triton.cdiv(hidden, block))](
        down_PH,
        ids_TK,
        weights_TK,
        added,
        residual,
        out_TH,
        added.stride(0),
        residual.stride(0),
        first_slot,
        SLOTS=slots,
        H=hidden,
        TOP_K=top_k,
        ADDED=added_TH is not None,
        RESIDUAL=residual_TH is not None,
        BLOCK_H=block,
        # A multiplication and the addition behind it are rounded each, as in the reference.
        enable_fp_fusion=False,
    )
    return out_TH


def _or(tensor: torch.Tensor | None, unused: torch.Tensor) -> torch.Tensor:
    """A pointer that the kernel does not follow where there is no tensor."""
    return unused if tensor is None else tensor
