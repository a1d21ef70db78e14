"""Which attention back end serves, and why.

The rule of 'auto': torch on a CPU, Triton on a GPU, and 'split' on a Hopper GPU where FlashInfer
has kernels that fit the model and has compiled them already: that takes about 95 s, which only
who asks for 'split' waits for. Decode stays with Triton: there what a row gets does not depend on
its batch, and the prompt of a group is read once for all its samples. Prefill is bound by matrix
products, for which FlashInfer has kernels written for Hopper; those do not cut a row's KV either,
unlike the ones it has for other GPUs. Models with a sliding window are served by torch and Triton:
FlashInfer plans a window into a whole step, not into single layers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from engine.attention.base import AttentionBackend
from engine.attention.fa3_cache import (
    cache_folders,
    holds_fa3_prefill,
    installed_release,
    prebuilt_folders,
)
from engine.attention.flashinfer import DTYPES, HEAD_DIMS, FlashInferBackend
from engine.attention.split import SplitBackend
from engine.config import AttentionBackendName
from engine.errors import InvalidRequest
from engine.kv.layout import common_heads
from engine.kv.pool import KVPool


@dataclass(frozen=True)
class Choice:
    """A back end and the reason it was taken, for the log."""

    backend: AttentionBackend
    reason: str


def select(
    name: AttentionBackendName,
    pool: KVPool,
    *,
    num_heads: int,
    scale: float,
    device: torch.device,
) -> Choice:
    """Build the back end `name`; 'auto' as at the top of this file.

    Raises InvalidRequest when the back end cannot run this model on `device`, or needs a package
    that is not there.
    """
    layout = common_heads(pool.layouts)
    dtype, head_dim = layout.dtype, layout.key_dim
    refusal = flashinfer_refusal(
        device.type,
        dtype,
        head_dim,
        installed=flashinfer_installed(),
        scaled=layout.scaled,
        windowed=any(layer.window is not None for layer in pool.layouts),
    )
    found, reason = name, "asked for"
    if name == "auto":
        found, reason = _automatic(device, dtype, head_dim, refusal)
    if found != "torch_native" and device.type != "cuda":
        raise InvalidRequest(
            f"{found!r} needs a GPU; use 'torch_native' or 'auto' on a CPU", field="attention"
        )
    if found in ("flashinfer", "split") and refusal:
        raise InvalidRequest(
            f"{found!r} cannot serve: {refusal}; use 'triton' or 'auto'", field="attention"
        )
    return Choice(_build(found, pool, num_heads=num_heads, scale=scale), reason)


def flashinfer_installed() -> bool:
    """Whether FlashInfer and what it loads its kernels with are there; imports neither."""
    return find_spec("flashinfer") is not None and find_spec("tvm_ffi") is not None


def flashinfer_refusal(
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    installed: bool,
    scaled: bool = False,
    windowed: bool = False,
) -> str:
    """Why FlashInfer cannot serve; empty if it can."""
    if device_type != "cuda":
        return "FlashInfer needs a GPU"
    if scaled:
        return "FlashInfer reads no KV with a scale for each token and head (kv_dtype fp8_e4m3)"
    if windowed:
        return "FlashInfer plans no sliding windows of single layers"
    if dtype not in DTYPES:
        return f"FlashInfer has no kernels for {str(dtype).removeprefix('torch.')}"
    if head_dim not in HEAD_DIMS:
        return f"FlashInfer has no kernels for heads of {head_dim}, only of {HEAD_DIMS}"
    if not installed:
        return "FlashInfer is not installed (pip install flashinfer-python)"
    return ""


def is_hopper(device: torch.device) -> bool:
    """Whether FlashInfer has its FA3 kernels for this GPU."""
    return torch.cuda.get_device_capability(device)[0] == 9


def is_prefill_compiled(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether FlashInfer has its FA3 prefill kernels ready, in its cache or in a package."""
    cached = cache_folders(os.environ, Path.home(), installed_release())
    return holds_fa3_prefill([*cached, *prebuilt_folders()], dtype, head_dim)


def _automatic(
    device: torch.device, dtype: torch.dtype, head_dim: int, refusal: str
) -> tuple[AttentionBackendName, str]:
    if device.type != "cuda":
        return "torch_native", f"auto: {device.type} device"
    if refusal:
        return "triton", f"auto: {refusal}"
    if not is_hopper(device):
        return "triton", "auto: FlashInfer's batch-invariant prefill needs a Hopper GPU"
    if not is_prefill_compiled(dtype, head_dim):
        return "triton", (
            "auto: FlashInfer's prefill kernels for this model are not compiled yet; "
            "attention='split' compiles them once, in about 95 s; then 'auto' takes them"
        )
    return "split", "auto: FlashInfer's prefill, Triton's grouped and batch-invariant decode"


def _build(
    name: AttentionBackendName, pool: KVPool, *, num_heads: int, scale: float
) -> AttentionBackend:
    if name == "torch_native":
        from engine.attention.torch_native import TorchNativeBackend

        return TorchNativeBackend(pool, num_heads=num_heads, scale=scale)
    if name == "flashinfer":
        return FlashInferBackend(pool, num_heads=num_heads, scale=scale)
    from engine.attention.triton import TritonBackend

    triton = TritonBackend(pool, scale=scale)
    if name == "triton":
        return triton
    flashinfer = FlashInferBackend(pool, num_heads=num_heads, scale=scale, long_queries=0)
    return SplitBackend(pool, prefill=flashinfer, decode=triton)
