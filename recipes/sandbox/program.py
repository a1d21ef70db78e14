"""What goes into a sandbox and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SandboxPolicy = Literal["require", "best-effort"]
"""Refuse a machine that cannot confine a program wholly, or run programs with what there is."""
Ended = Literal["exit", "signal", "cpu", "wall", "output", "disk", "threads"]
"""Why a program is over: it left or a signal ended it; or it reached a limit of processor time, of
the clock, of what it may print, of its folder, or of its threads."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one program.

    cpu_s: whole seconds of processor time. wall_s: of the clock. memory_bytes: of its address
    space. file_bytes: of one file; folder_bytes and folder_entries: of all in its folder.
    output_bytes: of what it prints, to both streams together.
    """

    cpu_s: int = 5
    wall_s: float = 30.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 8 << 20
    folder_bytes: int = 64 << 20
    folder_entries: int = 1000
    open_files: int = 32
    threads: int = 64
    output_bytes: int = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Program:
    """A Python program. stdin: what it reads. asserts: statements that are run after it, each by
    itself, in its own module; they are not to be seen before it has ended."""

    code: str
    stdin: str = ""
    asserts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a program.

    code: its exit code, or the number of the signal. passed: of each assert, whether it held.
    failed: why the sandbox did not run it, or ""; nothing is known of the program then.
    """

    ended: Ended = "exit"
    code: int = 0
    stdout: str = ""
    stderr: str = ""
    passed: tuple[bool, ...] = ()
    cpu_s: float = 0.0
    failed: str = ""

    @property
    def finished(self) -> bool:
        """Whether it ran to its end without an error."""
        return not self.failed and self.ended == "exit" and self.code == 0
