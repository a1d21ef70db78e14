"""A run that is measured often equals one that is not: no cached prefix, no seed, no figure."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.actors.launch import launch_actor
from recipes.environments.base import heldout_problems
from recipes.evaluation.eval_sets import EvalSet
from recipes.evaluation.evaluation_options import EvaluationOptions
from recipes.grpo import train
from recipes.run.ledger import Ledger
from recipes.run.opening import assemble
from recipes.run.run import Run
from recipes.settings.options import RolloutOptions, RunOptions
from recipes.trainers.model import load_trainer
from recipes.trainers.optimizer_options import OptimizerOptions
from recipes.types import Problem
from rollout.offline import load_tokenizer
from tests.helpers.char_model import CharAddition, char_model, write_char_model

pytestmark = pytest.mark.slow


class LeadingDigit(CharAddition):
    """A reward that a random model can find."""

    def verify(self, reply: str, problem: Problem) -> float:
        return float(reply[:1].isdigit())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("char_model")
    write_char_model(folder, char_model(32, 1))
    return str(folder)


def go(model: str, out: Path, **changes: Any) -> tuple[Run, dict[str, Any]]:
    options = RunOptions(
        model=model,
        out=str(out),
        steps=4,
        eval_prompts=5,
        checkpoint_every=0,
        device="cpu",
        dtype="float32",
        rollout=RolloutOptions(prompts_per_step=3, samples=4, max_new_tokens=3, kv_memory_gb=0.01),
        optimizer=OptimizerOptions(lr=1e-2),
    )
    options = dataclasses.replace(options, **changes)
    actor = launch_actor(options)
    task = LeadingDigit()
    run = assemble(
        options,
        Ledger(),
        environment=task,
        actor=actor,
        tokenizer=load_tokenizer(model),
        trainer=load_trainer(options, actor),
        # Problems that are trained on too: their prompts must not be cached afterwards.
        sets=[EvalSet(name="same", environment=task, problems=tuple(heldout_problems(task, 4)))],
    )
    with run:
        run.begin()
        train(run)
        summary = run.finish()
    return run, summary


def trained(row: dict[str, Any]) -> dict[str, Any]:
    """The figures of a step that another evaluation must leave alone."""
    other = ("timing_s/", "perf/rollout_tokens_per_s", "push/", "eval/")
    return {key: value for key, value in row.items() if not key.startswith(other)}


def test_a_run_with_evaluations_equals_one_without(model: str, tmp_path: Path) -> None:
    without, _ = go(model, tmp_path / "a", eval_every=0)
    options = EvaluationOptions(eval_samples=4, eval_k=(1, 2), eval_temperature=0.8)
    measured, summary = go(model, tmp_path / "b", eval_every=1, evaluation=options)
    rows = measured.folder.read_metrics()
    assert [trained(r) for r in rows] == [trained(r) for r in without.folder.read_metrics()]
    assert all("eval/same/pass@2" in row and "eval/accuracy" in row for row in rows)
    models = [run.trainer.weights.parameters() for run in (measured, without)]
    assert all(torch.equal(a, b) for a, b in zip(*models, strict=True))
    lines = (measured.folder.evaluations_path).read_text().splitlines()
    evaluated = [json.loads(line) for line in lines]
    assert [row["step"] for row in evaluated] == [0, 1, 2, 3, 4]
    for name, row in (("before", evaluated[0]), ("after", evaluated[-1])):
        assert summary["evaluation"][name] == {k: v for k, v in row.items() if k != "step"}
    assert summary["eval_after"] == evaluated[-1]["eval/heldout/accuracy"]
