"""`python -m rollout.dashboard.runs.beside_run FOLDER --fd N --parent PID`: the page of a run that
goes on, in a process of its own beside it (`recipes/run/dashboard.py` starts it).

It reads the run's folder alone, at a lower priority than the run, and ends with it.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from rollout.cli.failures import report
from rollout.dashboard.runs.page_server import serve_page
from rollout.dashboard.runs.run_source import RunSource
from rollout.dashboard.standalone import PageConfig, page_app

_NICENESS = 10
_LOOK_S = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until the parent ends it, or is gone. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fd", type=int, required=True, help="a socket that is bound")
    parser.add_argument("--parent", type=int, required=True, help="the run's process")
    given = parser.parse_args(argv)
    os.nice(_NICENESS)
    threading.Thread(target=_end_with, args=(given.parent,), daemon=True).start()
    try:
        listener = socket.socket(fileno=given.fd)
        host, port = listener.getsockname()[:2]
        app = page_app(RunSource(given.folder), PageConfig(host=host, port=port))
        serve_page(app, listener)
    except (Exception, KeyboardInterrupt) as error:
        code = report(error, advice={})
        if code is None:
            raise
        return code
    return 0


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
