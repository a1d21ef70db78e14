"""The stacks of a process that does not come along: what each of its threads is at.

A process that may hang has its stacks written when it gets SIGUSR1, by `faulthandler`, which needs
neither the interpreter's lock nor a thread of it. Whoever watches the processes of a replica asks
all of them, and keeps what they wrote.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import stat
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

logger = logging.getLogger(__name__)

_PREFIX = "stacks-"
_ROWS = "slow-step"
_MOST_ROWS = 64


def register_stacks(folder: Path, name: str) -> None:
    """Write the stacks of this process's threads into a file of `folder` on SIGUSR1, from now on.
    name: of the process."""
    file = (folder / f"{_PREFIX}{os.getpid()}-{name}").open("w")
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)


def note_rows(folder: Path, rids: Sequence[str]) -> None:
    """Note which sequences a step is for, which has taken long already."""
    more = f" and {len(rids) - _MOST_ROWS} more" if len(rids) > _MOST_ROWS else ""
    names = f": {', '.join(rids[:_MOST_ROWS])}{more}" if rids else ""
    text = f"{len(rids)} sequences{names}"
    (folder / _ROWS).write_text(text, encoding="utf-8", errors="backslashreplace")


class StackDump:
    """Asks the processes of one replica for their stacks. folder: of `register_stacks`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._why = ""
        self._sizes: dict[Path, int] = {}

    @property
    def asked(self) -> bool:
        """Whether stacks were asked for and not yet taken."""
        return bool(self._why)

    def ask(self, why: str) -> None:
        """Have every process write its stacks, within milliseconds."""
        self._why = why
        self._sizes = {path: path.stat().st_size for path in self._files()}
        for path in self._sizes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(_pid_of(path), signal.SIGUSR1)

    def take(self, what: str) -> None:
        """Log what came, and keep it in a file that the line names. what: whose stacks they are."""
        parts = [f"{what} {self._why}", self._rows()]
        for path, size in self._sizes.items():
            name = path.name.removeprefix(_PREFIX).partition("-")[2]
            written = path.read_bytes()[size:].decode(errors="replace") or "(it wrote nothing)"
            parts.append(f"--- {name}, process {_pid_of(path)}\n{written.rstrip()}")
        self._why, self._sizes = "", {}
        text = "\n".join(part for part in parts if part)
        try:
            where = f"This is in {_keep(text)} too."
        except OSError as error:
            # The engine it is about may still come along: what cannot be kept is no end of it.
            where = f"This could not be kept in a file: {error}"
        logger.error("%s\n%s", text, where)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob(f"{_PREFIX}*"))

    def _rows(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return (self._folder / _ROWS).read_text(encoding="utf-8")
        return ""


def _pid_of(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX).partition("-")[0])


def _keep(text: str) -> Path:
    """Write the text to a new file that only this user reads. Raises OSError."""
    folder = Path(tempfile.gettempdir(), f"slipstream-stacks-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    seen = folder.lstat()
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.getuid() or seen.st_mode & 0o077:
        # Everybody may make a folder of this name there, or a link, and would read along.
        folder = Path(tempfile.mkdtemp(prefix="slipstream-stacks-"))
    name = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    path = folder / f"{name}.txt"
    path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    return path
