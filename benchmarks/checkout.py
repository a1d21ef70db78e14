"""The checkout that a benchmark lies in, which is the one it measures.

Every script of this folder imports this before anything of the project. `python benchmarks/X.py`
then needs no installation, and where another checkout is installed it does not measure that one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Behind this folder, which is first and has the scripts that import each other by name.
sys.path.insert(1, str(ROOT))


def environment(**changes: str) -> dict[str, str]:
    """The environment of a process that imports the project: its packages come from here."""
    path = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **changes}
