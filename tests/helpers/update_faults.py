"""Faults inside the commands of an update: a torch operation or a call of ours that raises.

One fault at a time, at any point of any command: the n-th operation that writes or computes on
tensors (a copy is left half done), or the n-th call of a function of `engine/weights`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import engine.weights
from engine.weights.helpers import nothing

ERRORS: tuple[Callable[[], Exception], ...] = (
    lambda: torch.OutOfMemoryError("CUDA out of memory (injected)"),
    lambda: RuntimeError("a kernel failed (injected)"),
    lambda: MemoryError("no host memory (injected)"),
)
_FOLDER = str(Path(engine.weights.__file__).parent)


class OperationFault(TorchDispatchMode):
    """Counts torch operations that are no views; number `at`, from 1, raises `error`."""

    def __init__(self, at: int, error: Exception) -> None:
        super().__init__()
        self.count = 0
        self._at = at
        self._error = error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run, or fail at, one operation."""
        if not func.is_view:
            self.count += 1
            if self.count == self._at:
                _half(func, args)
                raise self._error
        return func(*args, **(kwargs or {}))


@contextmanager
def call_fault(at: int, error: Exception) -> Iterator[list[int]]:
    """Counts calls of functions of `engine/weights` in this thread; number `at` raises."""
    count = [0]

    def trace(frame: FrameType, event: str, _arg: Any) -> None:
        code = frame.f_code
        # A generator that is resumed would be unwound without its handlers.
        if not code.co_filename.startswith(_FOLDER) or code.co_flags & inspect.CO_GENERATOR:
            return
        # How often a wait looks up depends on the time it takes.
        if code is nothing.__code__:
            return
        count[0] += 1
        if count[0] == at:
            raise error

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


@contextmanager
def fault(kind: str, at: int, error: Exception) -> Iterator[None]:
    """A fault of `kind`, "operation" or "call", inside the block."""
    if kind == "call":
        with call_fault(at, error):
            yield
    else:
        with OperationFault(at, error):
            yield


@contextmanager
def counting(kind: str) -> Iterator[Callable[[], int]]:
    """How many points of `kind` the block passes."""
    if kind == "call":
        with call_fault(-1, RuntimeError()) as count:
            yield lambda: count[0]
    else:
        with OperationFault(-1, RuntimeError()) as mode:
            yield lambda: mode.count


def _half(func: Any, args: Any) -> None:
    """What a copy that dies leaves behind."""
    if func is torch.ops.aten._foreach_copy_.default:
        targets, sources = args[0], args[1]
        half = len(targets) // 2
        if half:
            func(targets[:half], sources[:half])
    elif func is torch.ops.aten.copy_.default and args[0].is_contiguous():
        half = args[0].numel() // 2
        args[0].view(-1)[:half].copy_(args[1].expand_as(args[0]).reshape(-1)[:half])
