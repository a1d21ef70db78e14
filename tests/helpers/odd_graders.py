"""A grader that does what replies tell it to: all that a grader of a run may do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def grade(reply: str) -> Any:
    """A number is its own reward; other replies are commands."""
    if reply.isdigit():
        return float(reply)
    if reply in _COMMANDS:
        return _COMMANDS[reply]()
    command, _, place = reply.rpartition(" ")
    _WITH_A_CHILD[command](Path(place))
    return 1.0


def leading_digit(reply: str) -> float:
    """1.0 for a reply that begins with a digit; one that begins with + cannot be graded."""
    if reply[:1] == "+":
        raise ValueError("no digit")
    return float(reply[:1].isdigit())


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


class Untold(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def _raise(error: BaseException) -> float:
    raise error


def _alarms_off() -> float:
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGTERM, signal.SIGINT})
    time.sleep(3600)
    return 1.0


def _stop() -> float:
    os.kill(os.getpid(), signal.SIGSTOP)
    return 1.0


def _leaderless() -> float:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(3600)
    return 1.0


def _fork() -> float:
    if os.fork():
        time.sleep(0.2)
    return 1.0


def _child(place: Path, **options: Any) -> None:
    child = subprocess.Popen(["sleep", "3600"], **options)
    place.write_text(str(child.pid))
    child.returncode = 0  # not looked after, and no warning of it


def _daemon(place: Path) -> None:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            place.write_text(str(os.getpid()))
            time.sleep(3600)
        os._exit(0)
    os.wait()
    while not (place.exists() and place.read_text()):
        time.sleep(0.01)


def _hang(place: Path) -> None:
    _child(place, start_new_session=True)
    time.sleep(3600)


_WITH_A_CHILD = {
    "child": _child,
    "child of a session": lambda place: _child(place, start_new_session=True),
    "daemon": _daemon,
    "hangs with a child": _hang,
}

_COMMANDS = {
    "loop": _loop,
    "loop in C": lambda: pow(3, 10**9) % 7,
    "loop that catches all": _loop_that_catches_all,
    "sleep": lambda: time.sleep(3600) or 1.0,
    "sleep with alarms off": _alarms_off,
    "0.1 s": lambda: time.sleep(0.1) or 1.0,
    "stop": _stop,
    "raise what cannot be told": lambda: _raise(Untold()),
    "sys.exit": lambda: sys.exit(0),
    "interrupt": lambda: _raise(KeyboardInterrupt()),
    "exit well": lambda: os._exit(0),
    "leaderless": _leaderless,
    "raise": lambda: {}["no"],
    "recurse": _recurse,
    "exit": lambda: os._exit(3),
    "crash": _crash,
    "killed": _killed,
    "memory": lambda: len(bytearray(8 << 30)),
    "nan": lambda: float("nan"),
    "huge": lambda: 10**400,
    "none": lambda: None,
    "text": lambda: "0.5",
    "list": lambda: [1.0],
    "true": lambda: True,
    "float32": lambda: np.float32(1.0),
    "forks and both return": _fork,
    "print": _print,
    "leader": os.getppid,
}
