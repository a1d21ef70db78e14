"""Which device and which dtype: the two choices that decide an engine's numbers.

docs/numerics.md explains them to a user; this file is the rule itself.
"""

from __future__ import annotations

from pathlib import Path

import torch

from engine.config import Device, DType, KernelBackend
from engine.errors import InvalidRequest

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_device(device: Device) -> torch.device:
    """'auto' is the GPU when torch sees one. Raises InvalidRequest for a GPU that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest("'cuda', but torch sees no GPU; use 'cpu' or 'auto'", field="device")
    return torch.device(device)


def resolve_dtype(dtype: DType, device: torch.device, cpu_flags: str | None = None) -> torch.dtype:
    """'auto' is bfloat16 wherever the device multiplies it at least as fast as float32.

    That is every GPU we serve, and a processor with bf16 matrix tiles (AMX) or with AVX-512
    bf16 dot products of full width (AMD Zen 4 and later). Intel processors that offer
    AVX512_BF16 without AMX run those products at half the float32 rate (docs/numerics.md has
    the measurement), so there 'auto' is float32. `cpu_flags` replaces /proc/cpuinfo in tests.
    """
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if _cpu_is_fast_in_bf16(cpu_flags) else torch.float32


def _cpu_is_fast_in_bf16(cpu_info: str | None) -> bool:
    if cpu_info is None:
        path = Path("/proc/cpuinfo")
        cpu_info = path.read_text() if path.exists() else ""
    words = set(cpu_info.split())
    return "amx_bf16" in words or ("avx512_bf16" in words and "AuthenticAMD" in words)


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Major and minor number of a GPU; None of a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def kernel_backend(device: torch.device) -> KernelBackend:
    """Back end of the pointwise kernels: Triton on a GPU, plain torch on a CPU."""
    return "triton" if device.type == "cuda" else "torch"


def dtype_name(dtype: torch.dtype) -> str:
    """'bfloat16' for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
