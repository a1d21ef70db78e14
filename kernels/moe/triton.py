"""Experts on GPU. No call waits for the device, and every grid follows from the number of tokens
alone: a graph can hold them.

T tokens, K experts of a token, H hidden width, I inner width, J = 2 I; S slots for experts on this
rank, P = T K pairs of a token and an expert, M tiles.
"""

from __future__ import annotations

import torch
import triton

from kernels.moe.combine import combine_kernel
from kernels.moe.gemv import combined_kernel, pair_kernel
from kernels.moe.plan import (
    FEW_PAIRS,
    SORT_BLOCK,
    ByPair,
    ByTile,
    Config,
    Gemv,
    Tile,
    choose,
    num_tiles,
)
from kernels.moe.sort import count_kernel, place_kernel
from kernels.moe.tiles import tiles_kernel

_COMBINE_BLOCK = 1024


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
    if isinstance(config, ByPair) and len(x_TH):
        inner_PI = x_TH.new_empty(ids_TK.numel(), inner)
        _by_pair(x_TH, gate_up_SJH, ids_TK, inner_PI, first_slot, config.up, up=True)
        routes = (ids_TK, weights_TK, first_slot)
        return _down_combined(inner_PI, down_SHI, routes, added_TH, residual_TH, config.down)
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


def _down_combined(
    inner_PI: torch.Tensor,
    down_SHI: torch.Tensor,
    routes: tuple[torch.Tensor, torch.Tensor, int],
    added_TH: torch.Tensor | None,
    residual_TH: torch.Tensor | None,
    config: Gemv,
) -> torch.Tensor:
    """What few tokens get of their experts, [T, H]. routes: ids [T, K], weights, first slot."""
    ids_TK, weights_TK, first_slot = routes
    rows, top_k = ids_TK.shape
    slots, hidden, inner = down_SHI.shape
    assert down_SHI.is_contiguous() and ids_TK.is_contiguous() and weights_TK.is_contiguous()
    out_TH = inner_PI.new_empty(rows, hidden)
    added, residual = _or(added_TH, out_TH), _or(residual_TH, out_TH)
    assert added.stride(1) == 1 and residual.stride(1) == 1
    combined_kernel[(rows, triton.cdiv(hidden, config.block_o))](
        inner_PI,
        down_SHI,
        ids_TK,
        weights_TK,
        added,
        residual,
        out_TH,
        added.stride(0),
        residual.stride(0),
        first_slot,
        SLOTS=slots,
        OUT=hidden,
        IN=inner,
        TOP_K=top_k,
        ADDED=added_TH is not None,
        RESIDUAL=residual_TH is not None,
        BLOCK_O=config.block_o,
        BLOCK_I=triton.next_power_of_2(inner),
        num_warps=config.warps,
        # As in `_combine`.
        enable_fp_fusion=False,
    )
    return out_TH


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
