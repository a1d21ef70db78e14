"""`push`: publish a trainer's weights as version v, in place.

docs/weight_update.md follows one push file by file.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from engine.protocol import BeginUpdate, TensorSpec
from trainer_bridge.adapters.plain import named_tensors
from trainer_bridge.control import UpdateTarget
from trainer_bridge.transports import disk, inproc

Transport = Literal["inproc", "disk"]


@dataclass(frozen=True, kw_only=True)
class PushReport:
    """What one push cost. Times in seconds.

    memcpy_seconds: a plain copy of the same bytes, measured beside it when asked for.
    """

    version: int
    num_tensors: int
    num_bytes: int
    seconds: float
    memcpy_seconds: float | None = None

    def __str__(self) -> str:
        rate = self.num_bytes / self.seconds / 1e9
        text = (
            f"version {self.version}: {self.num_tensors} tensors, {self.num_bytes / 1e6:.0f} MB "
            f"in {self.seconds * 1e3:.0f} ms ({rate:.1f} GB/s)"
        )
        if self.memcpy_seconds is None:
            return text
        ratio = self.seconds / self.memcpy_seconds
        return f"{text}; memcpy {self.memcpy_seconds * 1e3:.0f} ms, ratio {ratio:.2f}"


def push(
    model: torch.nn.Module,
    version: int,
    replica: UpdateTarget,
    *,
    transport: Transport = "inproc",
    folder: str | Path | None = None,
    measure_memcpy: bool = False,
) -> PushReport:
    """Publish every parameter of `model` to `replica` as `version`.

    model: a transformers model or any module whose parameter names are the Hugging Face ones.
    version: greater than the version that serves now.
    transport: 'inproc' for an engine of this process, 'disk' for any; `folder` is where
        'disk' writes (a temporary folder if None).

    Requests in flight continue across the push; their tokens carry the version that sampled
    each. Raises ManifestMismatch, naming the tensor, when the model's parameters are not the
    engine's, and another WeightUpdateError otherwise; the old version then keeps serving.
    """
    started = time.perf_counter()
    tensors = list(named_tensors(model))
    begin = BeginUpdate(version=version, manifest=manifest(tensors))
    if transport == "inproc":
        report = inproc.send(begin, tensors, replica)
    elif folder is not None:
        report = disk.send(begin, tensors, replica, Path(folder))
    else:
        with tempfile.TemporaryDirectory(prefix="weights-") as scratch:
            report = disk.send(begin, tensors, replica, Path(scratch))
    seconds = time.perf_counter() - started
    return PushReport(
        version=version,
        num_tensors=report.num_tensors,
        num_bytes=report.num_bytes,
        seconds=seconds,
        memcpy_seconds=memcpy_seconds(tensors) if measure_memcpy else None,
    )


def manifest(tensors: list[tuple[str, torch.Tensor]]) -> list[TensorSpec]:
    """Names, dtypes and shapes of the tensors that will come."""
    return [
        TensorSpec(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        for name, tensor in tensors
    ]


def memcpy_seconds(tensors: list[tuple[str, torch.Tensor]]) -> float:
    """Seconds to copy the same bytes into memory that is already mapped: the floor of a push."""
    copies = [torch.empty_like(tensor) for _, tensor in tensors]
    for copy, (_, tensor) in zip(copies, tensors, strict=True):
        copy.copy_(tensor)
    _synchronize(tensors)
    started = time.perf_counter()
    for copy, (_, tensor) in zip(copies, tensors, strict=True):
        copy.copy_(tensor)
    _synchronize(tensors)
    return time.perf_counter() - started


def _synchronize(tensors: list[tuple[str, torch.Tensor]]) -> None:
    if tensors and tensors[0][1].is_cuda:
        torch.cuda.synchronize(tensors[0][1].device)
