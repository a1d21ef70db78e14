"""The benchmarks of speculative decoding run through on a CPU, and what they compute from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "benchmarks/shapes/tiny.json")


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def run_script(name: str, target: Path, *words: str) -> tuple[dict[str, Any], str]:
    command = [sys.executable, f"benchmarks/{name}", "--model", TINY, "--load-format", "random"]
    done = subprocess.run(
        [*command, *words, "--json", str(target)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(target.read_text()), done.stdout


@pytest.mark.slow
def test_every_part_runs(tmp_path: Path) -> None:
    found, told = run_script(
        "speculative.py",
        tmp_path / "x.json",
        *("--device", "cpu", "--dtype", "float32", "--pairs", "1", "--output-tokens", "12"),
        *("--parts", "forced", "off", "adaptive", "tail", "--batches", "2", "--off-batches", "2"),
        *("--adaptive-batches", "2", "--acceptances", "0.0", "1.0", "--prompt-tokens", "16"),
        *("--tail-requests", "6", "--tail-shorten", "128"),
    )
    assert found["machine"] and found["machine"] in told
    check = found["check"]
    assert check["flips"] == 0 and 0 < check["accepted"] <= check["drafted"]
    (forced,) = found["forced"]
    assert forced["rows"] == 2 and 1 < forced["tau"] <= 4
    assert forced["share"] == pytest.approx(forced["ratio"] / forced["ideal"])
    assert forced["verify_ms"] >= forced["plain_ms"] and forced["draft_us"] > 0
    # No draft comes true at 0; at 1 all do, if the controller asks for any.
    none, all_of_them = (row["tau"] for row in found["adaptive"])
    assert none == 1.0 <= all_of_them <= 4.0
    assert set(found["tail"]) == {"ngram", "auto"}
    assert "captured within" not in told


@pytest.mark.long
def test_siblings_run_on_a_cpu(tmp_path: Path) -> None:
    found, told = run_script(
        "speculative_cpu.py",
        tmp_path / "x.json",
        *("--dtype", "float32", "--prompts", "2", "--samples", "2", "--output-tokens", "24"),
        *("--pairs", "1", "--temperature", "0.0"),
    )
    siblings = found["parts"]["siblings"]
    assert siblings["same"] == 1.0 and siblings["tokens"] == 2 * 2 * 24
    assert set(siblings["tokens_per_s"]) == {"off", "ngram"}
    assert set(found["parts"]["default"]["tokens_per_s"]) == {"off", "auto"}
    assert "siblings: ngram / off" in told


def test_the_acceptance_of_a_mean_count() -> None:
    from speculative_engine import acceptance_for, expected_tau

    assert acceptance_for(3.0, 3) == pytest.approx(0.8105, abs=1e-4)
    for tau, k in ((1.5, 1), (2.0, 7), (3.9, 3)):
        assert expected_tau(acceptance_for(tau, k), k) == pytest.approx(tau)


def test_a_window_counts_tokens_a_row_a_step() -> None:
    from speculative_engine import Window

    window = Window(steps=10, tokens=120, seconds=0.5, rows=4, captures=0)
    assert (window.tau, window.step_ms, window.tokens_per_s) == (3.0, 50.0, 240.0)
