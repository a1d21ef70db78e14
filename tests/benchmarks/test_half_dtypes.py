"""What the benchmark of 16-bit dtypes makes of the figures of its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def row(step: int, **more: float) -> dict[str, Any]:
    gap = "sampling/sampling_logp_difference"
    figures = {"reward": 0.5, f"{gap}/mean": 0.1 * step, f"{gap}/max": float(step)}
    figures |= {"rollout_corr/k3_kl": 0.01, "perf/rollout_tokens_per_s": 100.0 * step}
    phases = ("step", "generate", "train", "push", "score", "other")
    return figures | {f"timing_s/{phase}": 2.0 * step for phase in phases} | more


def run_of(dtype: str, part: str = "learning") -> dict[str, Any]:
    from half_dtypes import figures_of

    scaled = {"train/skipped_steps": 1.0, "train/loss_scale": 512.0}
    rows = [row(1), row(2, **{"eval/accuracy": 0.4}), row(3, **scaled)]
    summary = {"eval_before": 0.1, "eval_after": 0.8, "seconds": 9.0}
    return {"part": part, "dtype": dtype, "seed": 0, **figures_of(rows, summary)}


def test_the_record_of_a_run() -> None:
    found = run_of("float16")
    assert found["accuracies"] == [0.1, 0.4, 0.8]
    assert found["mismatch"]["max"] == [1.0, 2.0, 3.0]
    assert found["rollout_tokens_per_s"] == 250.0 and found["seconds"]["step"] == 5.0
    assert (found["skipped_steps"], found["loss_scale"]) == (1.0, 512.0)


def test_a_dtype_is_summed_up_over_its_own_runs() -> None:
    from half_dtypes import summarise

    failed = {"part": "learning", "dtype": "bfloat16", "seed": 1, "failed": "no"}
    runs = [run_of("bfloat16"), run_of("float16"), failed, run_of("float16", "speed")]
    other, half = (summarise(runs, dtype) for dtype in ("bfloat16", "float16"))
    assert (other["failed"], half["failed"]) == (1, 0)
    assert half["mismatch_mean"] == pytest.approx(0.2) and half["mismatch_max"] == 3.0
    assert "rollout_tokens_per_s" not in other and half["rollout_tokens_per_s"] == 250.0


def test_dtypes_take_turns() -> None:
    from half_dtypes import Options, jobs_of

    jobs = jobs_of(Options(seeds="3-4", repeats=1), "learning")
    assert [(j.dtype, j.seed) for j in jobs] == [
        ("bfloat16", 3),
        ("float16", 3),
        ("bfloat16", 4),
        ("float16", 4),
    ]
    assert len(jobs_of(Options(repeats=3), "speed")) == 6


@pytest.mark.slow
def test_the_default_model_is_written_in_bfloat16(default_model: str, tmp_path: Path) -> None:
    from half_dtypes import export_bfloat16

    export_bfloat16(default_model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert (tmp_path / "tokenizer.json").exists()
