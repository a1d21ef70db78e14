"""A mixture of experts through both commands, on a CPU: a short SFT, then GRPO on replayed routes.

A model of 0.1M parameters with random weights says the largest of four digits. The seed is fixed;
`benchmarks/moe_learning.py` measures several, with routers trained and frozen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recipes import grpo, sft
from tests.helpers.char_experts import GRPO, SFT, write_char_experts, write_largest
from tests.helpers.char_model import char_model, write_char_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The model is too small for more: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_largest(tmp_path_factory.mktemp("task") / "largest.jsonl")


@pytest.fixture(scope="module")
def tuned(task: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    cold = write_char_experts(folder / "cold")
    words = ["--task", task, "--eval-task", task, "--model", cold, "--out", str(folder / "run")]
    assert sft.main([*SFT, *words]) == 0
    return folder / "run"


def summary_of(run: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return told


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_rewards_teach_a_mixture_of_experts_on_the_engines_routes(
    task: str, tuned: Path, tmp_path: Path
) -> None:
    rows = rows_of(tuned)
    assert all(0 < row["router/load_entropy"] < 2.08 for row in rows)
    run = tmp_path / "run"
    words = ["--task", task, "--model", str(tuned / "model"), "--out", str(run), "--steps", "25"]
    assert grpo.main([*GRPO, *words, "--routing-replay"]) == 0
    summary, rows = summary_of(run), rows_of(run)
    assert summary["eval_before"] == summary_of(tuned)["eval_after"]
    assert summary["eval_after"] >= summary["eval_before"] + 0.1
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-4
    assert all(row["router/replay_absent"] == 0.0 for row in rows)
    # In float32 the engine's routers and the trainer's agree but for ties; replies that waited for
    # a step were routed by older weights.
    fresh = [row["router/replay_flips"] for row in rows if not row["perf/stale_response_tokens"]]
    stale = [row["router/replay_flips"] for row in rows if row["perf/stale_response_tokens"]]
    assert fresh and max(fresh) < 1e-3
    assert not stale or max(stale) < 0.5


def test_frozen_routers_stay_to_the_last_bit(task: str, tuned: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--task", task, "--model", str(tuned / "model"), "--out", str(run), "--steps", "2"]
    assert grpo.main([*GRPO, *words, "--freeze-router", "--router-aux-coef", "0.01"]) == 0
    before = load_file(tuned / "model" / "model.safetensors")
    after = load_file(run / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    # An expert that nothing went to stays too.
    others = {name for name in same if ".experts." not in name}
    assert others == {name for name in before if name.endswith("mlp.gate.weight")}
    assert all(row["router/aux_loss"] >= 0.99 for row in rows_of(run))


@pytest.mark.parametrize("flag", ["--routing-replay", "--freeze-router", "--router-aux-coef"])
def test_a_dense_model_is_refused_before_anything_is_loaded(
    flag: str, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_char_model(tmp_path / "dense", char_model(16, 1))
    words = ["--task", task, "--model", str(tmp_path / "dense"), "--out", str(tmp_path / "run")]
    given = [flag, "0.1"] if flag == "--router-aux-coef" else [flag]
    assert grpo.main([*words, *given]) == 2
    name = flag.strip("-").replace("-", "_")
    assert f"InvalidRequest ({name})" in capsys.readouterr().err
