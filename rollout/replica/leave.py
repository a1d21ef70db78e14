"""How a spawned process of the engine ends."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NoReturn

_FAILED = 1


def run_and_leave(main: Callable[[list[str]], int], arguments: Sequence[str]) -> NoReturn:
    """Exit with what `main` returns; with 1 and a traceback if it raises. `main` must have closed
    what it opened and sent its last messages.

    The interpreter is not torn down: with torch in it that takes a second of a processor, which
    whoever waits for a group of ranks would wait for. What is registered to run at exit does, but
    after a failure, or with a thread left that waits for a peer: what it would destruct, such as a
    process group whose other ranks are gone, may still be in use by threads that cannot be
    stopped, and would replace the exit code by a crash.
    """
    code = _FAILED
    try:
        code = main(list(arguments))
    finally:
        if code == 0 and not _is_stuck():
            run_what_is_registered()
        leave_at_once(code)


def _is_stuck() -> bool:
    """Whether a thread waits for somebody outside, in a call that nobody can end."""
    return any(thread.name.startswith("weights-") for thread in threading.enumerate())


def run_what_is_registered() -> None:
    """What `atexit` runs at the end of an interpreter, for one that is not torn down."""
    atexit._run_exitfuncs()


def leave_at_once(code: int) -> NoReturn:
    """End this process without tearing the interpreter down; logs and streams are flushed. For
    a spawned process that failed, and for a server that is told a second time to stop."""
    error = sys.exception()
    if error is not None:
        sys.excepthook(type(error), error, error.__traceback__)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
