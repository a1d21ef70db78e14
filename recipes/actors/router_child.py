"""A router of the run's own, in a process that ends with it."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time

from engine.errors import EngineDead
from rollout.replica.python_child import child_command, child_environment

_ADDRESS = re.compile(r"serving .* at (http://\S+)")
_LEAVE_S = 40.0


class RouterChild:
    """`python -m rollout router` at `host`, on a free port. url: where it is. What it says goes to
    this process's stderr. Raises EngineDead if it does not start within `start_s`."""

    def __init__(self, host: str, *, admin_key: str, start_s: float) -> None:
        words = ["router", "--host", host, "--port", "0", "--admin-api-key", admin_key]
        guarded = child_command("rollout", *words)
        self._process = subprocess.Popen(
            child_command("recipes.actors.guard_main", *guarded),
            env=child_environment(),
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.url = ""
        self._told = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        deadline = time.monotonic() + start_s
        self._told.wait(max(deadline - time.monotonic(), 0.0))
        if not self.url:
            self.close()
            raise EngineDead(f"launch: no router started at {host}", field="launch")

    def close(self) -> None:
        """Tell it to leave, and wait until it has. Idempotent."""
        assert self._process.stdin is not None and self._process.stderr is not None
        self._process.stdin.close()
        self._process.wait(_LEAVE_S)
        self._reader.join()
        self._process.stderr.close()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            sys.stderr.write(line)
            found = _ADDRESS.search(line)
            if found is not None:
                self.url = found.group(1)
                self._told.set()
        self._told.set()
