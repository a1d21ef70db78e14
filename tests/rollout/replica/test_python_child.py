"""Processes that this one starts find the modules that it finds, wherever it stands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rollout.replica import python_child
from tests.helpers.children import child_environment

pytestmark = pytest.mark.slow

ASK_A_SPAWNED_LEADER = """
from tests.helpers.replicas import spawned
with spawned() as replica:
    print(replica.state().model)
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_folder_with_an_engine_of_its_own_is_none_to_a_leader(tmp_path: Path) -> None:
    """As where `slipstream`, whose own folder is not on the path, is started in it."""
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text("raise AssertionError('not ours')\n")
    done = run(tmp_path, "-P", "-c", ASK_A_SPAWNED_LEADER)
    assert done.returncode == 0, done.stderr


def test_the_folder_that_is_searched_here_is_searched_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -c` and the interactive interpreter have it as "", which is no folder elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "/somewhere"])
    found = python_child.child_environment()["PYTHONPATH"]
    assert found == os.pathsep.join([str(tmp_path), "/somewhere"])


def test_a_variable_that_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.delenv("RES_OPTIONS", raising=False)
    found = python_child.child_environment(OMP_WAIT_POLICY="passive", RES_OPTIONS="timeout:1")
    assert (found["OMP_WAIT_POLICY"], found["RES_OPTIONS"]) == ("active", "timeout:1")
