"""Drafts change when the tokens of a run come, and nothing else; a seed repeats a run with them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.actors.launch import launch_actor
from recipes.grpo import train
from recipes.run.ledger import Ledger
from recipes.run.opening import assemble
from recipes.run.run import Run
from recipes.settings.options import Drafter, RolloutOptions, RunOptions
from recipes.trainers.model import load_trainer
from recipes.trainers.optimizer_options import OptimizerOptions
from rollout.offline import load_tokenizer
from tests.helpers.char_model import CharAddition, char_model, write_char_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_plots")]

# Cold enough that a random model repeats itself.
ROLLOUT = RolloutOptions(
    prompts_per_step=3, samples=4, max_new_tokens=32, temperature=0.1, kv_memory_gb=0.01
)


class ManyDigits(CharAddition):
    """A reward that a random model earns some of."""

    def verify(self, reply: str, problem: Any) -> float:
        return sum(char.isdigit() for char in reply) / max(len(reply), 1)


def go(model: str, out: Path, drafter: Drafter) -> Run:
    options = RunOptions(
        model=model,
        out=str(out),
        steps=3,
        eval_every=2,
        eval_prompts=5,
        checkpoint_every=0,
        device="cpu",
        dtype="float32",
        rollout=dataclasses.replace(ROLLOUT, speculative=drafter),
        optimizer=OptimizerOptions(lr=1e-3),
    )
    actor = launch_actor(options)
    run = assemble(
        options,
        Ledger(),
        environment=ManyDigits(),
        actor=actor,
        tokenizer=load_tokenizer(model),
        trainer=load_trainer(options, actor),
    )
    with run:
        run.begin()
        train(run)
        run.finish()
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The same run with each drafter, and with 'auto' once more."""
    folder = tmp_path_factory.mktemp("runs")
    model = folder / "model"
    model.mkdir()
    write_char_model(model, char_model(32, 1))
    drafters: dict[str, Drafter] = {"off": "off", "ngram": "ngram", "auto": "auto", "again": "auto"}
    return {name: go(str(model), folder / name, drafter) for name, drafter in drafters.items()}


def untimed(run: Run) -> list[dict[str, Any]]:
    timed = ("timing_s/", "perf/rollout_tokens_per_s", "push/")
    rows = run.folder.read_metrics()
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def replies(run: Run) -> list[Any]:
    lines = (run.folder.path / "samples.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_weights(one: Run, other: Run) -> None:
    both = (one.trainer.weights.parameters(), other.trainer.weights.parameters())
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("drafter", ["auto", "ngram"])
def test_a_run_with_drafts_is_the_run_without_them(runs: dict[str, Run], drafter: str) -> None:
    plain, drafted = runs["off"], runs[drafter]
    assert replies(drafted) == replies(plain)
    assert_same_weights(drafted, plain)
    rewards = [[row["reward"] for row in untimed(run)] for run in (plain, drafted)]
    assert rewards[0] == rewards[1]


def test_a_run_says_what_came_of_its_drafts(runs: dict[str, Run]) -> None:
    figures = untimed(runs["ngram"])
    assert all(row["speculative/drafted"] > 0 for row in figures)
    assert any(row["speculative/accept_length"] > 1 for row in figures)
    assert not [name for row in untimed(runs["off"]) for name in row if "speculative" in name]


def test_a_seed_repeats_a_run_with_drafts(runs: dict[str, Run]) -> None:
    one, other = runs["auto"], runs["again"]
    assert untimed(one) == untimed(other)
    assert replies(one) == replies(other)
    assert_same_weights(one, other)
