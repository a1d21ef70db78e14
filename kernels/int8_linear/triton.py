"""Products of int8 on GPU: x quantised by a kernel of its own, with the norm before it.

R rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import triton

from kernels.activation.triton import silu_mul
from kernels.int8_linear.gemm import int8_gemm_kernel, int8_scale_kernel
from kernels.int8_linear.plan import Config, Gemm, Tiles, choose
from kernels.int8_linear.tiles import int8_tiles_kernel
from kernels.linear.fusion import Options
from kernels.quant.rows.triton import quantize_rows
from kernels.torch_compat import int8_product

_ROW_BLOCK = 16
_SCALE_ROWS, _SCALE_FEATURES = 4, 1024


def int8_linear(
    x_RI: torch.Tensor, weight_OI: torch.Tensor, scale_O: torch.Tensor, options: Options
) -> torch.Tensor:
    """See `kernels.int8_linear.int8_linear`."""
    features, ins = weight_OI.shape
    outs = features // 2 if options.gated else features
    can_split = options.counters is not None
    config = choose(len(x_RI), outs, ins, gated=options.gated, can_split=can_split)
    return with_config(x_RI, weight_OI, scale_O, options, config)


def with_config(
    x_RI: torch.Tensor,
    weight_OI: torch.Tensor,
    scale_O: torch.Tensor,
    options: Options,
    config: Config,
) -> torch.Tensor:
    """`int8_linear` by a given configuration."""
    assert weight_OI.is_contiguous()
    quantized_RI, scale_R = quantize_rows(x_RI, options.norm_weight_I, options.eps)
    if isinstance(config, Tiles):
        return _tiles(x_RI, quantized_RI, scale_R, weight_OI, scale_O, options, config)
    out_RO = x_RI.new_empty(len(x_RI), len(weight_OI))
    if isinstance(config, Gemm):
        _gemm(quantized_RI, scale_R, weight_OI, scale_O, options.bias_O, out_RO, config)
    else:
        sums_RO = int8_product(quantized_RI, weight_OI)
        _scale(sums_RO, scale_R, scale_O, options.bias_O, out_RO)
    if options.gated:
        return silu_mul(out_RO)
    return out_RO if options.residual_RO is None else options.residual_RO + out_RO


def _tiles(
    x_RI: torch.Tensor,
    quantized_RI: torch.Tensor,
    scale_R: torch.Tensor,
    weight_OI: torch.Tensor,
    scale_O: torch.Tensor,
    options: Options,
    config: Tiles,
) -> torch.Tensor:
    rows = len(x_RI)
    assert rows <= _ROW_BLOCK
    features, ins = weight_OI.shape
    outs = features // 2 if options.gated else features
    out_RO = x_RI.new_empty(rows, outs)
    if not rows:
        return out_RO
    residual = _or(options.residual_RO, x_RI)
    partial, counters, tiles = scale_R, scale_R, triton.cdiv(outs, config.block_o)
    if config.splits > 1:
        assert options.counters is not None and tiles <= len(options.counters)
        assert not options.gated
        partial = x_RI.new_empty(config.splits, rows, outs, dtype=torch.int32)
        counters = options.counters
    int8_tiles_kernel[(tiles, config.splits)](
        quantized_RI,
        scale_R,
        weight_OI,
        scale_O,
        _or(options.bias_O, x_RI),
        residual,
        out_RO,
        partial,
        counters,
        residual.stride(0),
        rows,
        OUT=outs,
        IN=ins,
        BLOCK_O=config.block_o,
        BLOCK_I=config.block_i,
        BLOCK_R=_ROW_BLOCK,
        SPLITS=config.splits,
        STAGES=config.stages,
        BIAS=options.bias_O is not None,
        GATED=options.gated,
        RESIDUAL=options.residual_RO is not None,
        num_warps=config.warps,
        # A multiplication and the addition behind it are rounded each, as in the reference.
        enable_fp_fusion=False,
    )
    return out_RO


def _gemm(
    quantized_RI: torch.Tensor,
    scale_R: torch.Tensor,
    weight_OI: torch.Tensor,
    scale_O: torch.Tensor,
    bias_O: torch.Tensor | None,
    out_RO: torch.Tensor,
    config: Gemm,
) -> None:
    rows, outs = out_RO.shape
    grid = (triton.cdiv(rows, config.block_r), triton.cdiv(outs, config.block_o))
    int8_gemm_kernel[grid](
        quantized_RI,
        scale_R,
        weight_OI,
        scale_O,
        _or(bias_O, scale_O),
        out_RO,
        rows,
        OUT=outs,
        IN=weight_OI.shape[1],
        BLOCK_R=config.block_r,
        BLOCK_O=config.block_o,
        BLOCK_I=config.block_i,
        STAGES=config.stages,
        BIAS=bias_O is not None,
        num_warps=config.warps,
        enable_fp_fusion=False,
    )


def _scale(
    sums_RO: torch.Tensor,
    scale_R: torch.Tensor,
    scale_O: torch.Tensor,
    bias_O: torch.Tensor | None,
    out_RO: torch.Tensor,
) -> None:
    rows, outs = out_RO.shape
    int8_scale_kernel[(triton.cdiv(rows, _SCALE_ROWS), triton.cdiv(outs, _SCALE_FEATURES))](
        sums_RO,
        scale_R,
        scale_O,
        _or(bias_O, scale_O),
        out_RO,
        rows,
        OUT=outs,
        BLOCK_R=_SCALE_ROWS,
        BLOCK_O=_SCALE_FEATURES,
        BIAS=bias_O is not None,
        enable_fp_fusion=False,
    )


def _or(tensor: torch.Tensor | None, unused: torch.Tensor) -> torch.Tensor:
    """A pointer that the kernel does not follow where there is no tensor."""
    return unused if tensor is None else tensor
