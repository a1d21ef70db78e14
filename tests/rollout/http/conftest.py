"""Tests of the server are skipped where FastAPI is not installed, as on a machine that only
runs the engine."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest


class Skipped(pytest.Module):
    """A module that is not imported, since it could not be."""

    def collect(self) -> Iterator[pytest.Item]:
        """Nothing, with the reason."""
        pytest.skip("FastAPI is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> Skipped | None:
    """Skip the modules of this folder where they cannot be imported. Not `importorskip`, which
    in a conftest ends the whole run when this folder is named on the command line."""
    if find_spec("fastapi") is not None:
        return None
    return Skipped.from_parent(parent, path=module_path)
