"""Inside a grader's process: the function is found, and called for one reply."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import resource
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from recipes.rewards.base import Failed, as_grade

MAX_REASON = 300
"""Characters of a reason, so that a frame is written to a pipe at once or not at all."""
FILE_MODULE = "reward_file"
"""What a user's file is called among the modules, so that it hides none."""


def load(function: str) -> Callable[..., Any]:
    """The function called "module:function" or "FILE.py:function". Raises what the module does,
    or AttributeError or TypeError where it has no such function.

    A file finds those beside it, as if it were run."""
    place, _, name = function.rpartition(":")
    module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    if not hasattr(module, name):
        raise AttributeError(f"{place} has no function {name}")
    found: Callable[..., Any] = getattr(module, name)
    if not callable(found):
        raise TypeError(f"{name} of {place} is {type(found).__name__}, not a function")
    return found


def _load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(FILE_MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[FILE_MODULE] = module
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module


def limit_memory(num_bytes: int) -> None:
    """Let this process have `num_bytes` more of address space than it has now; no core file."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + num_bytes
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def call(grader: Callable[..., Any], job: dict[str, Any]) -> dict[str, Any]:
    """The frame's part of one reply: its reward, or kind and reason.

    job: `arguments` and `keywords` of the call, and `cpu_s`, seconds of processor time after which
    the kernel ends this process, or None."""
    signal.setitimer(signal.ITIMER_PROF, job["cpu_s"] or 0)
    try:
        value = grader(*job["arguments"], **job["keywords"])
        if inspect.isawaitable(value):
            value = asyncio.run(_wait(value))
        grade = as_grade(value)
    except MemoryError:
        grade = Failed(kind="memory", reason="took more memory than it may")
    except BaseException as error:  # whatever a grader raises is told to the run
        grade = Failed(kind="raised", reason=f"raised {told(error)}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if isinstance(grade, Failed):
        return {"kind": grade.kind, "reason": grade.reason[:MAX_REASON]}
    return {"reward": grade}


async def _wait(value: Awaitable[Any]) -> Any:
    return await value


def told(error: BaseException) -> str:
    """Class and text of an error, whose text may raise another."""
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:  # a user's class
        text = type(error).__name__
    return text[:MAX_REASON]
