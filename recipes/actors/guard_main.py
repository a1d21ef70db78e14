"""`python -m recipes.actors.guard_main COMMAND...`: runs a command that must not outlive whoever
holds the other end of this process's stdin, such as an actor of Ray, which may be killed."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

_GRACE_S = 10.0
_PR_SET_PDEATHSIG = 1


def main(words: Sequence[str]) -> int:
    """Run `words` to its end; the exit code. At the end of stdin it is told to leave, and killed if
    it does not."""
    libc = ctypes.CDLL(None)

    def follow() -> None:
        # Should this process be killed itself.
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, preexec_fn=follow)
    threading.Thread(target=_end_with_stdin, args=(process,), daemon=True).start()
    return process.wait()


def _end_with_stdin(process: subprocess.Popen[bytes]) -> None:
    # Not `sys.stdin`, whose lock Python cannot take from a reader at its end.
    while os.read(0, 4096):
        pass
    process.terminate()
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
