"""Classes under the module paths of trainers' packages, which are not installed here."""

from __future__ import annotations

import ctypes
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

BUCKETS = "sglang.srt.weight_sync.tensor_bucket"
RUNNER = "sglang.srt.model_executor.model_runner"
NCCL = "vllm.distributed.device_communicators.pynccl_wrapper"
PATCH = "sglang.srt.utils.patch_torch"


@contextmanager
def foreign_classes() -> Iterator[types.SimpleNamespace]:
    """Their classes by name; while this is open they can be pickled as theirs."""

    @dataclass
    class FlattenedTensorMetadata:
        name: str
        shape: torch.Size
        dtype: torch.dtype
        start_idx: int
        end_idx: int
        numel: int

    @dataclass
    class LocalSerializedTensor:
        values: list[bytes]

    class ncclUniqueId(ctypes.Structure):
        _fields_ = [("internal", ctypes.c_byte * 128)]

    def _rebuild_cuda_tensor_modified(*_: Any) -> None:
        raise AssertionError("only its name is pickled")

    places = [
        (BUCKETS, FlattenedTensorMetadata),
        (RUNNER, LocalSerializedTensor),
        (NCCL, ncclUniqueId),
        (PATCH, _rebuild_cuda_tensor_modified),
    ]
    before = dict(sys.modules)
    try:
        for module, thing in places:
            _make(module)
            thing.__module__, thing.__qualname__ = module, thing.__name__
            setattr(sys.modules[module], thing.__name__, thing)
        yield types.SimpleNamespace(**{thing.__name__: thing for _, thing in places})
    finally:
        for name in sys.modules.keys() - before.keys():
            if name.partition(".")[0] in ("sglang", "vllm"):
                del sys.modules[name]


def flattened_bucket(classes: types.SimpleNamespace, tensors: Any) -> dict[str, Any]:
    """What SGLang's `FlattenedTensorBucket` sends: bytes, and metadata counting bytes."""
    metadata, parts, end = [], [], 0
    for name, tensor in tensors:
        part = tensor.contiguous().reshape(-1).view(torch.uint8)
        start, end = end, end + part.numel()
        metadata.append(
            classes.FlattenedTensorMetadata(
                name, tensor.shape, tensor.dtype, start, end, part.numel()
            )
        )
        parts.append(part)
    return {"flattened_tensor": torch.cat(parts), "metadata": metadata}


def _make(module: str) -> None:
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        sys.modules.setdefault(name, types.ModuleType(name))
