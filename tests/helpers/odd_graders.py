"""A grader that does what replies tell it to: all that a grader of a run may do."""

from __future__ import annotations

import os
import signal
import sys
import time


def grade(reply: str) -> float:
    """A number is its own reward; other replies are commands."""
    if reply.isdigit():
        return float(reply)
    return float(_COMMANDS[reply]())


def leading_digit(reply: str) -> float:
    """1.0 for a reply that begins with a digit; others cannot be graded."""
    if not reply[:1].isdigit():
        raise ValueError("no digit")
    return 1.0


def _loop() -> float:
    while True:
        pass


def _loop_that_catches_all() -> float:
    while True:
        try:
            _loop()
        except BaseException:
            continue


def _recurse() -> float:
    return _recurse() + 1


def _crash() -> float:
    os.kill(os.getpid(), signal.SIGSEGV)
    return 1.0


def _killed() -> float:
    os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


def _print() -> float:
    sys.stdout.write("9" * 100)
    sys.stdout.flush()
    os.write(1, b"9" * 100)
    return 1.0


_COMMANDS = {
    "loop": _loop,
    "loop in C": lambda: pow(3, 10**9) % 7,
    "loop that catches all": _loop_that_catches_all,
    "sleep": lambda: time.sleep(3600) or 1.0,
    "raise": lambda: {}["no"],
    "recurse": _recurse,
    "exit": lambda: os._exit(3),
    "crash": _crash,
    "killed": _killed,
    "memory": lambda: len(bytearray(8 << 30)),
    "nan": lambda: float("nan"),
    "text": lambda: float("much"),
    "print": _print,
    "leader": os.getppid,
}
