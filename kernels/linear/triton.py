"""Fused products on GPU: the kernel for few rows, or cuBLAS between separate kernels.

R rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton

from kernels.activation.triton import silu_mul
from kernels.linear.fusion import Options
from kernels.linear.gemv import gemv_kernel, norm_kernel
from kernels.linear.plan import Config, Gemv, Tiles, choose
from kernels.linear.tiles import tiles_kernel
from kernels.norm.triton import rms_norm

_ROW_BLOCK = 16


def fused_linear(x_RI: torch.Tensor, weight_OI: torch.Tensor, options: Options) -> torch.Tensor:
    """See `kernels.linear.fused_linear`."""
    features, ins = weight_OI.shape
    outs = features // 2 if options.gated else features
    config = None
    if x_RI.dtype.itemsize == 2:
        can_split = options.counters is not None
        config = choose(len(x_RI), outs, ins, gated=options.gated, can_split=can_split)
    return with_config(x_RI, weight_OI, options, config)


def with_config(
    x_RI: torch.Tensor, weight_OI: torch.Tensor, options: Options, config: Config | None
) -> torch.Tensor:
    """`fused_linear` by a given configuration; None composes separate kernels."""
    assert weight_OI.is_contiguous()
    if isinstance(config, Gemv):
        return _gemv(x_RI, weight_OI, options, config)
    if options.norm_weight_I is not None:
        x_RI = rms_norm(x_RI, options.norm_weight_I, options.eps)
    if config is None:
        return _composed(x_RI, weight_OI, options)
    return _few_rows(x_RI, weight_OI, options, config)


def _composed(x_RI: torch.Tensor, weight_OI: torch.Tensor, options: Options) -> torch.Tensor:
    out_RO = F.linear(x_RI, weight_OI, options.bias_O)
    if options.gated:
        return silu_mul(out_RO)
    return out_RO if options.residual_RO is None else options.residual_RO + out_RO


def _gemv(
    x_RI: torch.Tensor, weight_OI: torch.Tensor, options: Options, config: Gemv
) -> torch.Tensor:
    rows = len(x_RI)
    assert x_RI.stride(1) == 1
    features, ins = weight_OI.shape
    outs = features // 2 if options.gated else features
    out_RO = x_RI.new_empty(rows, outs)
    norm_weight_I, residual = options.norm_weight_I, _or(options.residual_RO, x_RI)
    # Every program norms its rows again: of several rows, for features in pairs, that takes longer
    # than a kernel of its own.
    if norm_weight_I is not None and (rows > 2 or (rows > 1 and options.gated)):
        x_RI = _gemv_norm(x_RI, norm_weight_I, options.eps, config)
        norm_weight_I = None
    gemv_kernel[(triton.cdiv(outs, config.block_o),)](
        x_RI,
        weight_OI,
        _or(options.bias_O, x_RI),
        _or(norm_weight_I, x_RI),
        residual,
        out_RO,
        x_RI.stride(0),
        residual.stride(0),
        options.eps,
        OUT=outs,
        IN=ins,
        ROWS=rows,
        BLOCK_O=config.block_o,
        BLOCK_I=config.block_i,
        STAGES=config.stages,
        UNROLL=config.unroll,
        BIAS=options.bias_O is not None,
        NORM=norm_weight_I is not None,
        GATED=options.gated,
        RESIDUAL=options.residual_RO is not None,
        num_warps=config.warps,
    )
    return out_RO


def _gemv_norm(
    x_RI: torch.Tensor, norm_weight_I: torch.Tensor, eps: float, config: Gemv
) -> torch.Tensor:
    """The rows as the product of one of them would norm it."""
    rows, ins = x_RI.shape
    normed_RI = x_RI.new_empty(rows, ins)
    norm_kernel[(rows,)](
        x_RI,
        norm_weight_I,
        normed_RI,
        x_RI.stride(0),
        eps,
        IN=ins,
        BLOCK_I=config.block_i,
        num_warps=config.warps,
    )
    return normed_RI


def _few_rows(
    x_RI: torch.Tensor, weight_OI: torch.Tensor, options: Options, config: Tiles
) -> torch.Tensor:
    rows = len(x_RI)
    assert rows <= _ROW_BLOCK and x_RI.stride(1) == 1
    features, ins = weight_OI.shape
    outs = features // 2 if options.gated else features
    out_RO = x_RI.new_empty(rows, outs)
    residual = _or(options.residual_RO, x_RI)
    partial, counters, tiles = out_RO, x_RI, triton.cdiv(outs, config.block_o)
    if config.splits > 1:
        assert options.counters is not None and tiles <= len(options.counters)
        assert not options.gated
        partial = x_RI.new_empty(config.splits, rows, outs, dtype=torch.float32)
        counters = options.counters
    tiles_kernel[(tiles, config.splits)](
        x_RI,
        weight_OI,
        _or(options.bias_O, x_RI),
        residual,
        out_RO,
        partial,
        counters,
        x_RI.stride(0),
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
    )
    return out_RO


def _or(tensor: torch.Tensor | None, unused: torch.Tensor) -> torch.Tensor:
    """A pointer that the kernel does not follow where there is no tensor."""
    return unused if tensor is None else tensor
