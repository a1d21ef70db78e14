"""What a confined process does: it runs the program as Python would, then the asserts.

The supervisor sends the asserts when the program has ended, with a word that it did not know, so
that a program cannot claim by leaving early, or by what it prints, that they held. A program that
means to deceive can still do so in its own process, by values that equal everything for example.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterable
from typing import Any

NAME = "program.py"
TESTS, VERDICTS = 3, 4
"""File descriptors: of the asserts, and of what this process says of itself."""
CONFINED, RAN, BROKEN = b"confined\n", b"ran\n", b"broken "
"""Its words, each once and in this order; the last one with a reason, in place of the first."""


def settle(folder: str, places: Iterable[str]) -> None:
    """Make the process look like a fresh one: folder, environment, where modules are found."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(
        HOME=folder, TMPDIR=folder, PATH="/usr/bin:/bin", LANG="C.UTF-8", OMP_NUM_THREADS="1"
    )
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    tempfile.tempdir = None
    inside = tuple(os.path.join(place, "") for place in places)
    sys.path[:] = [folder, *(p for p in sys.path if os.path.realpath(p).startswith(inside))]
    sys.argv[:] = [NAME]


def run(code: str, *, has_asserts: bool) -> None:
    """Run the program as the main module, and tell of the asserts. The process ends when the
    interpreter does, with the exit code that Python would give, and without taking itself apart,
    which would cost more than a short program."""
    write, read, decode, compiled = os.write, os.read, json.loads, compile
    exit_code = [0]
    # Registered first, so it is called last: after what the program has registered.
    atexit.register(_leave, exit_code, os._exit)
    namespace = _new_main()
    exit_code[0] = _exit_code(compiled, code, namespace)
    if not has_asserts or exit_code[0]:
        return
    write(VERDICTS, RAN)
    told = b"".join(iter(lambda: read(TESTS, 1 << 16), b""))
    word, asserts = decode(told)
    for number, statement in enumerate(asserts):
        try:
            exec(compiled(statement, f"assert {number}", "exec"), namespace)
        except (Exception, SystemExit):  # whatever a program raises, the assert does not hold
            continue
        write(VERDICTS, f"{word} {number}\n".encode())


def _new_main() -> dict[str, Any]:
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    return module.__dict__


def _exit_code(
    compiled: Callable[..., types.CodeType], code: str, namespace: dict[str, Any]
) -> int:
    try:
        exec(compiled(code, NAME, "exec"), namespace)
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return (leaving.code or 0) & 0xFF
        sys.stderr.write(f"{leaving.code}\n")
        return 1
    except BaseException as error:  # as the interpreter ends a program that raises
        trace = error.__traceback__
        sys.excepthook(type(error), error.with_traceback(trace and trace.tb_next), None)
        return 1
    return 0


def _leave(exit_code: list[int], leave: Callable[[int], None]) -> None:
    for stream in (sys.stdout, sys.stderr):
        # A program may have closed or replaced them.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    leave(exit_code[0])
