"""The supervisor's eyes on one program: what it prints, how long it takes, what it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from recipes.rewards.graders import descendants
from recipes.sandbox import folders, inside
from recipes.sandbox.program import Ended, Limits, Outcome

TICK_S = 0.02
"""How often limits are looked at that the kernel does not keep."""
LAST_TICK_S = 0.001
CLOSED = -1
CHUNK = 1 << 16


@dataclass(kw_only=True)
class Child:
    """A process of a program and the ends of its pipes: of both outputs, of its verdicts, and the
    one by which it gets the asserts."""

    pid: int
    folder: str
    stdout: int
    stderr: int
    verdicts: int
    tests: int


@dataclass(kw_only=True)
class Watch:
    """Watches a child until it is over. asserts: for when its program has ended. abandoned: whether
    nobody waits for the outcome any more, asked at each tick."""

    child: Child
    asserts: tuple[str, ...]
    limits: Limits
    abandoned: Callable[[], bool]
    _word: str = field(default_factory=lambda: secrets.token_hex(8))
    _told: dict[int, bytearray] = field(default_factory=dict)
    _ended: Ended | None = None
    _rest: memoryview | None = None

    def outcome(self) -> Outcome:
        """Wait, end the process and all that it started, and say what became of it."""
        child = self.child
        readers = (child.stdout, child.stderr, child.verdicts)
        self._told = {fd: bytearray() for fd in readers}
        with selectors.DefaultSelector() as selector:
            for fd in readers:
                os.set_blocking(fd, False)
                selector.register(fd, selectors.EVENT_READ)
            self._follow(selector)
            status, cpu_s = _end(child.pid)
            for fd in readers:
                self._read(fd)
        for fd in (*readers, child.tests):
            if fd != CLOSED:
                os.close(fd)
        return self._judge(status, cpu_s)

    def _follow(self, selector: selectors.BaseSelector) -> None:
        """Until the process is over, or may not go on."""
        deadline = time.monotonic() + self.limits.wall_s
        while self._ended is None and not _is_over(self.child.pid):
            tick = TICK_S if selector.get_map() else LAST_TICK_S
            for key, events in selector.select(tick):
                self._attend(selector, key.fd, events)
            self._ended = self._beyond(deadline)
            if self.abandoned():
                self._ended = "wall"

    def _attend(self, selector: selectors.BaseSelector, fd: int, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._send(selector)
        elif not self._read(fd):
            selector.unregister(fd)
        if self._rest is None and inside.RAN in self._told[self.child.verdicts]:
            tests = json.dumps([self._word, self.asserts]).encode()
            self._rest = memoryview(tests)
            os.set_blocking(self.child.tests, False)
            selector.register(self.child.tests, selectors.EVENT_WRITE)

    def _send(self, selector: selectors.BaseSelector) -> None:
        assert self._rest is not None
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            self._rest = self._rest[os.write(self.child.tests, self._rest[:CHUNK]) :]
            if self._rest:
                return
        selector.unregister(self.child.tests)
        os.close(self.child.tests)
        self.child.tests = CLOSED

    def _read(self, fd: int) -> bool:
        """Take what is there, as far as it may be told; whether more may come."""
        told = self._told[fd]
        while len(told) <= self.limits.output_bytes:
            try:
                part = os.read(fd, CHUNK)
            except BlockingIOError:
                return True
            if not part:
                return False
            told += part
        return True

    def _beyond(self, deadline: float) -> Ended | None:
        """The limit that is reached, if one is."""
        limits, child = self.limits, self.child
        if sum(map(len, self._told.values())) > limits.output_bytes:
            return "output"
        if time.monotonic() >= deadline:
            return "wall"
        num_bytes, num_entries = folders.usage(child.folder, limits.folder_entries)
        if num_bytes > limits.folder_bytes or num_entries > limits.folder_entries:
            return "disk"
        return "threads" if _num_threads(child.pid) > limits.threads else None

    def _judge(self, status: int, cpu_s: float) -> Outcome:
        verdicts = bytes(self._told[self.child.verdicts])
        if not verdicts.startswith(inside.CONFINED):
            return Outcome(failed=_why(verdicts, status), cpu_s=cpu_s)
        code = os.waitstatus_to_exitcode(status)
        ended: Ended = self._ended or ("exit" if code >= 0 else "signal")
        if self._ended is None and _is_for_time(code, cpu_s, self.limits):
            ended = "cpu"
        held = set(verdicts.decode(errors="replace").splitlines())
        text = partial(bytes.decode, encoding="utf-8", errors="replace")
        most = self.limits.output_bytes
        return Outcome(
            ended=ended,
            code=abs(code),
            stdout=text(bytes(self._told[self.child.stdout][:most])),
            stderr=text(bytes(self._told[self.child.stderr][:most])),
            passed=tuple(f"{self._word} {number}" in held for number in range(len(self.asserts))),
            cpu_s=cpu_s,
        )


def _why(verdicts: bytes, status: int) -> str:
    if verdicts.startswith(inside.BROKEN):
        return verdicts.removeprefix(inside.BROKEN).decode(errors="replace").strip()
    return f"its process was not confined before it ended ({os.waitstatus_to_exitcode(status)})"


def _is_for_time(code: int, cpu_s: float, limits: Limits) -> bool:
    """Whether the kernel ended a program for its processor time. One that ignores the first signal
    gets another, which says less; the kernel counts in ticks, and may be ahead of the true time."""
    return code == -signal.SIGXCPU or (code == -signal.SIGKILL and cpu_s >= limits.cpu_s / 2)


def _is_over(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end(pid: int) -> tuple[int, float]:
    """Kill the group of a process and every other process below this one, and wait for them; its
    status and processor time."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        # It is not reaped yet, so the group is still its own.
        os.killpg(pid, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    _, status, used = os.wait4(pid, 0)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
        # There is one more, that had left the group.
        descendants.end_all()
    return status, used.ru_utime + used.ru_stime


def _num_threads(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[17])
