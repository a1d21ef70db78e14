"""A process that runs programs one after the other, each in a confined child of its own.

Started by `sandbox.Sandbox` alone, with a scrubbed environment. It has the interpreter ready, so a
program costs a fork and not a start of Python. It has one thread; it ends when its input ends, also
in the middle of a program. Asserts come in a frame of their own: the child, a copy of this process,
must not hold them.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import json
import os
import select
import stat
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

from recipes.rewards.graders import descendants
from recipes.rewards.graders.frames import read_frame, write_frame
from recipes.sandbox import folders, inside
from recipes.sandbox.confine import confine
from recipes.sandbox.kernel import SandboxReport, load_libc, probe
from recipes.sandbox.landlock import readable_places
from recipes.sandbox.program import Limits, Outcome
from recipes.sandbox.watch import Child, Watch

SELF_CHECK = """
import os, socket
def opened(path, flags):
    os.close(os.open(path, flags))
def written(path):
    opened(path, os.O_CREAT | os.O_WRONLY)
    os.unlink(path)
for name, attempt in {
    "reading other files": lambda: opened("/", os.O_RDONLY),
    "writing other files": lambda: written("../beside"),
    "sockets": lambda: socket.socket().close(),
    "other processes": lambda: os.kill(os.getppid(), 0),
    "new processes": os.fork,
}.items():
    try:
        attempt()
    except OSError:
        continue
    print(name, flush=True)
    if name == "new processes":
        os._exit(0)
"""
"""A program that tries what none may do, and prints what it could."""
MOST_FDS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Mine:
    """What the child of a program knows of it: not the asserts, which are read after the fork."""

    code: str
    stdin: str = ""
    has_asserts: bool = False


@dataclass(frozen=True, kw_only=True)
class Supervisor:
    """home: a folder of its own, where each program gets one. source, sink: file descriptors of the
    frames."""

    libc: ctypes.CDLL
    report: SandboxReport
    limits: Limits
    places: tuple[str, ...]
    home: str
    source: int
    sink: int

    def serve(self) -> Mine | None:
        """Say what confines programs here, then run them until the input ends. Returns twice: in
        the child of a program, confined, that program; at the end None."""
        outcome = self.run(Mine(code=SELF_CHECK))
        if isinstance(outcome, Mine):
            return outcome
        failed = outcome.failed
        if not (failed or outcome.finished):
            failed = f"the first program ended by {outcome.ended} {outcome.code}: {outcome.stderr}"
        report = dataclasses.replace(self.report, leaks=tuple(outcome.stdout.splitlines()))
        told = {"report": dataclasses.asdict(report), "home": self.home, "failed": failed}
        write_frame(self.sink, told)
        while (frame := read_frame(self.source)) is not None:
            outcome = self.run(Mine(**frame))
            if isinstance(outcome, Mine):
                return outcome
            # Of a run that is gone, the end of the input says so.
            with contextlib.suppress(BrokenPipeError):
                write_frame(self.sink, dataclasses.asdict(outcome))
        return None

    def run(self, program: Mine) -> Outcome | Mine:
        """What became of a program; in its child, the program itself. A machine without room for
        one more process ends this one, by OSError."""
        folder = os.path.join(self.home, "program")
        os.mkdir(folder, stat.S_IRWXU)
        child = self._start(program, folder)
        if child is None:
            return program
        watch = Watch(
            child=child,
            asserts=self._asserts() if program.has_asserts else (),
            limits=self.limits,
            abandoned=self._is_abandoned,
        )
        outcome = watch.outcome()
        folders.remove(folder)
        return outcome

    def _asserts(self) -> tuple[str, ...]:
        frame = read_frame(self.source)
        return () if frame is None else tuple(frame["asserts"])

    def _start(self, program: Mine, folder: str) -> Child | None:
        """Fork. None in the child, once it is confined."""
        stdin = _file_of(program.stdin)
        pipes = [os.pipe() for _ in range(4)]
        (out, err, verdicts, tests), (its_out, its_err, its_verdicts, its_tests) = (
            (*(read for read, _ in pipes[:3]), pipes[3][1]),
            (*(write for _, write in pipes[:3]), pipes[3][0]),
        )
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            fds = (stdin, its_out, its_err, its_tests, its_verdicts)
            self._become_program(fds, folder, parent)
            return None
        for fd in (stdin, its_out, its_err, its_verdicts, its_tests):
            os.close(fd)
        return Child(pid=pid, folder=folder, stdout=out, stderr=err, verdicts=verdicts, tests=tests)

    def _become_program(self, fds: tuple[int, ...], folder: str, parent: int) -> None:
        try:
            os.setpgid(0, 0)
            # Out of the way of the numbers they get.
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD, len(fds)) for fd in fds]
            for place, fd in enumerate(high):
                os.dup2(fd, place)
            os.closerange(len(fds), MOST_FDS)
            inside.settle(folder, self.places)
            confine(
                self.libc,
                self.report,
                self.limits,
                folder=folder,
                places=self.places,
                parent=parent,
            )
        except OSError as error:
            os.write(inside.VERDICTS, inside.BROKEN + str(error).encode())
            os._exit(1)
        os.write(inside.VERDICTS, inside.CONFINED)

    def _is_abandoned(self) -> bool:
        """One program at a time is asked for: whatever comes meanwhile is the end."""
        readable, _, _ = select.select([self.source], [], [], 0)
        return bool(readable)


def _file_of(text: str) -> int:
    """A descriptor of a file without a name that holds a text."""
    with tempfile.TemporaryFile() as file:
        file.write(text.encode("utf-8", "surrogatepass"))
        file.flush()
        fd = os.dup(file.fileno())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def main(settings: dict[str, Any]) -> Mine | None:
    """Serve. Returns in the child of every program too, with the program."""
    source, sink = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    libc = load_libc()
    descendants.adopt()
    supervisor = Supervisor(
        libc=libc,
        report=probe(libc),
        limits=Limits(**settings),
        places=readable_places(),
        home=tempfile.mkdtemp(prefix="sandbox-"),
        source=source,
        sink=sink,
    )
    program = supervisor.serve()
    if program is None:
        folders.remove(supervisor.home)
    return program


if __name__ == "__main__":
    mine = main(json.loads(sys.argv[1]))
    if mine is not None:
        inside.run(mine.code, has_asserts=mine.has_asserts)
