"""The benchmark of weight updates, as far as a CPU goes: it runs, and what it reports adds up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.children import ROOT, child_environment


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["--transport", "cuda_ipc", "--cycles", "2"], marks=pytest.mark.long),
        ["--transport", "nccl"],
    ],
)
def test_a_smoke_run_reports_every_figure(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [
        sys.executable,
        "benchmarks/weight_update.py",
        "--model",
        "benchmarks/shapes/tiny.json",
    ]
    command += ["--device", "cpu", "--updates", "2", "--rows", "2", "--json", str(out), *words]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=child_environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["options"]["model"] == "tiny.json"
    assert found["num_bytes"] > 0 and len(found["pushes_s"]) == 2
    assert found["busy_s"] <= found["push_s"] and found["floor_s"] > 0
    assert "x)" in done.stdout
