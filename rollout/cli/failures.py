"""What a command says when it ends by an error: one line with what to do.

Errors of the tree (`engine/errors.py`) say it themselves; a table adds what only a command knows,
such as the name of a flag. Errors of other libraries that a user can do something about have a row
of their own, by class, so that no library is imported to look. Everything else is a mistake of
ours, and keeps its traceback. `SLIPSTREAM_TRACEBACK=1` shows it for all.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping
from types import MappingProxyType

from engine.errors import EngineDead, SlipstreamError
from rollout.files.disk_space import disk_refusal

TRACEBACK = "SLIPSTREAM_TRACEBACK"
"""Set to anything, the traceback is written before the line."""

REFUSED, FAILED, INTERRUPTED = 2, 1, 130

ALL_FAILED, SOME_FAILED = 1, 3
"""Exit codes of a file of requests that was answered to its end: no line succeeded, or some did."""

# By package and name of a class; subclasses follow it. The text comes after the error's own.
FOREIGN: Mapping[str, str] = MappingProxyType(
    {
        "builtins.MemoryError": "the host's memory is full: use a smaller model or batches",
        "torch.OutOfMemoryError": "the GPU's memory is full: ask for less of it, or free "
        "what other processes hold (nvidia-smi lists them)",
        "torch.DistStoreError": "the processes of the run did not meet: check that all "
        "were started, and their MASTER_ADDR and MASTER_PORT",
        "torch.DistNetworkError": "the processes of the run cannot reach each other: "
        "check MASTER_ADDR and MASTER_PORT, and that the port is free",
        "torch.DistBackendError": "a process of the run is gone or cannot be reached: "
        "its own last line says why",
        "safetensors_rust.SafetensorError": "the file is broken or cut off: copy the model again",
        "safetensors.SafetensorError": "the file is broken or cut off: copy the model again",
    }
)
EXTRAS: Mapping[str, str] = MappingProxyType(
    {
        "deepspeed": "train",
        "triton": "gpu",
        "flashinfer": "gpu",
        "torch_memory_saver": "gpu",
        "wandb": "wandb",
        "openai": "judge",
        "pyarrow": "data",
        "reasoning_gym": "gym",
        "ray": "ray",
        "opentelemetry": "otel",
        "zstandard": "delta",
        "xxhash": "delta",
    }
)


def report(error: BaseException, *, advice: Mapping[str, str], then: str = "") -> int | None:
    """Write the one line to stderr; the exit code to leave with. None, and nothing written, for an
    error that nobody expected: raise it again.

    advice: class names of the tree, and what this command's user can do. then: what can be done
    after any error, such as how to go on.
    """
    found = explain(error, advice)
    if found is None:
        return None
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    line, code = found
    sys.stderr.write(f"{line}; {then}\n" if then else f"{line}\n")
    return code


def explain(error: BaseException, advice: Mapping[str, str]) -> tuple[str, int] | None:
    """The line and the exit code: 2 for errors of the tree, 1 for EngineDead and those of other
    libraries, 130 for an interrupt. None for what is not in the tables."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if isinstance(error, SlipstreamError):
        named = f" ({error.field})" if error.field else ""
        line = f"{type(error).__name__}{named}: {error}"
        code = FAILED if isinstance(error, EngineDead) else REFUSED
        return _joined(line, _of_class(error, advice, prefixed=False)), code
    told = _foreign(error)
    return None if told is None else (told, FAILED)


def _foreign(error: BaseException) -> str | None:
    name = type(error).__name__
    if disk_refusal(error) is not None:
        return _joined(f"{name}: {_one_line(error)}", "the disk is full: make room on it")
    known = _of_class(error, FOREIGN, prefixed=True)
    if known:
        return _joined(f"{name}: {_one_line(error)}", known)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{name}: {error.filename}: {error.strerror}; check the path and who may use it"
    if isinstance(error, ModuleNotFoundError):
        extra = EXTRAS.get((error.name or "").split(".")[0])
        if extra is not None:
            return f"{name}: {error.name} is not installed; pip install -e '.[{extra}]'"
    return None


def _of_class(error: BaseException, table: Mapping[str, str], *, prefixed: bool) -> str:
    for cls in type(error).__mro__:
        package = f"{cls.__module__.split('.')[0]}." if prefixed else ""
        found = table.get(f"{package}{cls.__qualname__}")
        if found is not None:
            return found
    return ""


def _one_line(error: BaseException) -> str:
    """The first line of a message that may have many, such as torch's."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else "no message"


def _joined(line: str, advice: str) -> str:
    return f"{line}; {advice}" if advice else line
