"""The page of a run while it goes on: a process of its own that reads the run's folder.

A step is not touched by it, and no run fails for it: what goes wrong is told in a line, and the run
goes on without the page.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from rollout.replica.python_child import child_command, child_environment

HOST = "127.0.0.1"
PAGE = "/dashboard"
_MODULE = "rollout.dashboard.runs.beside_run"
_BACKLOG = 64
_LEAVE_S = 5.0

Say = Callable[[str], None]
"""Shows a line that stays to be seen."""


@contextmanager
def dashboard_beside(setting: str, folder: Path, say: Say) -> Iterator[None]:
    """Around a run: its page, as `setting` says (`RunOptions.dashboard`). In the main process alone
    of a run of several."""
    port = port_of(setting, is_terminal=sys.stderr.isatty())
    page = None if port is None else _open(port, folder, say)
    try:
        yield
    finally:
        if page is not None:
            page.close()


def port_of(setting: str, *, is_terminal: bool) -> int | None:
    """The port of the page, 0 for a free one; None where there is to be none."""
    if setting == "off" or (setting == "auto" and not is_terminal):
        return None
    return 0 if setting in ("on", "auto") else int(setting)


def _open(port: int, folder: Path, say: Say) -> Page | None:
    try:
        listener = socket.create_server((HOST, port), backlog=_BACKLOG)
    except OSError as error:
        say(f"no dashboard: cannot listen at {HOST}:{port}: {error.strerror}; the run goes on")
        return None
    with listener:
        try:
            page = Page(listener, folder, say)
        except OSError as error:
            say(f"no dashboard: cannot start its process: {error}; the run goes on")
            return None
    say(f"dashboard: http://{HOST}:{page.port}{PAGE}")
    return page


class Page:
    """The process that serves the page of `folder` at `listener`, which it keeps open. Raises
    OSError if it cannot be started."""

    def __init__(self, listener: socket.socket, folder: Path, say: Say) -> None:
        self.port: int = listener.getsockname()[1]
        self._say = say
        self._told_to_leave = Event()
        descriptor = listener.fileno()
        words = [str(folder.resolve()), "--fd", str(descriptor), "--parent", str(os.getpid())]
        self._process = subprocess.Popen(
            child_command(_MODULE, *words),
            env=child_environment(),
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # An interrupt is the run's, which ends this one itself.
            start_new_session=True,
        )
        self._watcher = Thread(target=self._watch, daemon=True)
        self._watcher.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def close(self) -> None:
        """End the process. Idempotent."""
        self._told_to_leave.set()
        self._process.terminate()
        self._watcher.join(_LEAVE_S)
        if self._watcher.is_alive():
            self._process.kill()
            self._watcher.join()

    def _watch(self) -> None:
        """Read what it says of errors to its end; say so if that is before the run's."""
        assert self._process.stderr is not None
        with self._process.stderr as said:
            last = deque(said, maxlen=1)
        code = self._process.wait()
        if not self._told_to_leave.is_set():
            reason = last[0].decode(errors="replace").strip() if last else f"exit code {code}"
            self._say(f"the dashboard ended: {reason}; the run goes on")
