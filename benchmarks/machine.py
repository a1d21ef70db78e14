"""The machine a benchmark ran on, as its JSON names it."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def describe() -> str:
    """The GPU's name if torch sees one, else the processor's and its cores."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return processor()


def processor() -> str:
    """The processor's own name, what it offers in bf16, and its cores."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if "model name" in line]
    flags = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in text.split()]
    name = names[0] if names else platform.machine()
    return ", ".join([name, *flags, f"{os.cpu_count()} cores"])
