"""The benchmark of sharded updates, as far as a CPU goes: every way and mode, and their bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.children import ROOT, child_environment


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_smoke_run_compares_bits_and_reports_every_case(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "benchmarks/sharded_update.py", "--device", "cpu", "--updates", "1"]
    command += ["--model", "benchmarks/shapes/tiny.json", "--cases", "2", "--json", str(out)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=child_environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads(out.read_text())["cases"]
    assert [(case["way"], case["mode"]) for case in cases] == [
        ("excerpts", "in_place"),
        ("excerpts", "shadow"),
    ]
    for case in cases:
        names = [name for name, _ in case["commands"]]
        assert names[:3] == ["BeginUpdate", "ReceiveExcerpts", "CommitUpdate"]
        assert case["push_s"] > 0 and "PlanExcerpts" in [n for n, _ in case["first_commands"]]
