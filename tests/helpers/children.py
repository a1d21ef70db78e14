"""What a process that a test starts gets from it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def child_environment(*first: Path, **changes: str) -> dict[str, str]:
    """This process's environment and one thread for torch, with PYTHONPATH led by `first`, this
    repository by default. What PYTHONPATH names already stays: packages may come by it."""
    here = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [*map(str, first or (ROOT,)), *filter(None, here)]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path), **changes}


def heed_interrupts() -> None:
    """For `preexec_fn`: SIGINT does what it does in a terminal. What a shell starts in the
    background has it ignored, and so have its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
