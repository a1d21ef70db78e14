"""What a process that a test starts gets from it."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment, one thread for torch, and this repository first among what
    PYTHONPATH names: where packages come by PYTHONPATH, the child needs the rest of it too."""
    path = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path), **changes}
