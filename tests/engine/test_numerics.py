"""Device and dtype resolution."""

from __future__ import annotations

import pytest
import torch

from engine.errors import InvalidRequest
from engine.numerics import dtype_name, kernel_backend, resolve_device, resolve_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "flags,expected",
    [
        ("vendor_id : GenuineIntel avx512_bf16 amx_bf16", torch.bfloat16),
        ("vendor_id : AuthenticAMD avx512_bf16", torch.bfloat16),
        ("vendor_id : GenuineIntel avx512_bf16", torch.float32),
        ("vendor_id : AuthenticAMD avx2", torch.float32),
        ("", torch.float32),
    ],
)
def test_auto_takes_bfloat16_where_the_processor_is_fast_in_it(flags, expected) -> None:
    assert resolve_dtype("auto", CPU, cpu_flags=flags) == expected


def test_auto_takes_bfloat16_on_a_gpu() -> None:
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16


def test_a_named_dtype_wins() -> None:
    assert resolve_dtype("float16", CPU) == torch.float16
    assert dtype_name(torch.float16) == "float16"


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidRequest, match="no GPU") as refusal:
        resolve_device("cuda")
    assert refusal.value.field == "device"
    assert resolve_device("auto") == CPU


def test_kernels_follow_the_device() -> None:
    assert kernel_backend(CPU) == "torch"
    assert kernel_backend(torch.device("cuda")) == "triton"
