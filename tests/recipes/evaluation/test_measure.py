"""Figures of several sets from an engine, alone and shared among processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from engine.errors import GradingFailed
from recipes.environments.base import heldout_problems
from recipes.evaluation.eval_sets import EvalSet
from recipes.evaluation.evaluation_options import EvaluationOptions
from recipes.evaluation.measure import Evaluation
from recipes.types import Problem
from recipes.world import World
from tests.helpers.char_model import CharAddition, char_model, char_tokenizer
from tests.helpers.fake_actor import FakeActor
from tests.helpers.thread_world import in_world

SAMPLED = EvaluationOptions(eval_samples=4, eval_k=(1, 2), eval_temperature=0.9)


class FirstDigit(CharAddition):
    """A reward that a random model finds now and then: the reply begins with 1, 2 or 3."""

    def verify(self, reply: str, problem: Problem) -> float:
        return float(reply[:1] in ("1", "2", "3"))


def eval_set(name: str, num: int = 6, environment: Any = None) -> EvalSet:
    environment = environment or FirstDigit()
    problems = tuple(heldout_problems(environment, num))
    return EvalSet(name=name, environment=environment, problems=problems)


def measure(
    sets: Sequence[EvalSet],
    options: EvaluationOptions = SAMPLED,
    world: World | None = None,
    actor: FakeActor | None = None,
) -> dict[str, float]:
    evaluation = Evaluation(
        sets, options, tokenizer=char_tokenizer(), eos_ids=[0], max_new_tokens=2, world=world
    )
    return evaluation.measure(actor or FakeActor(char_model(16, 1), [0]))


def test_every_set_has_its_figures_and_the_main_one_is_the_accuracy() -> None:
    engine = FakeActor(char_model(16, 1), [0])
    figures = measure([eval_set("heldout"), eval_set("other", 3)], actor=engine)
    for name in ("heldout", "other"):
        for figure in ("accuracy", "pass@1", "pass@2", "avg@4", "num_failed"):
            assert f"eval/{name}/{figure}" in figures
        assert figures[f"eval/{name}/pass@1"] == pytest.approx(figures[f"eval/{name}/avg@4"])
        assert 0 < figures[f"eval/{name}/pass@1"] < figures[f"eval/{name}/pass@2"]
    assert figures["eval/accuracy"] == figures["eval/heldout/accuracy"]
    assert engine.num_requests == (6 + 3) * (1 + 4) and engine.num_flushes == 4
    assert "eval/accuracy" not in measure([eval_set("other")])


def test_without_samples_only_greedy_replies_are_taken() -> None:
    engine = FakeActor(char_model(16, 1), [0])
    figures = measure([eval_set("heldout")], EvaluationOptions(), actor=engine)
    assert engine.num_requests == 6
    assert set(figures) == {
        "eval/accuracy",
        "eval/heldout/accuracy",
        "eval/heldout/accuracy/stderr",
        "eval/heldout/num_failed",
    }


def test_a_measurement_is_the_same_again_and_depends_on_the_name_of_the_set() -> None:
    first = measure([eval_set("one")])
    assert measure([eval_set("one")]) == first
    beside = measure([eval_set("two"), eval_set("one")])
    assert {key: beside[key] for key in first} == first
    assert [v for k, v in beside.items() if "/two/" in k] != list(first.values())


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_problems_and_have_the_same_figures(size: int) -> None:
    sets = [eval_set("heldout", 5), eval_set("single", 1)]
    asked: list[int] = []
    model = char_model(16, 1)

    def act(world: World) -> dict[str, float]:
        engine = FakeActor(model, [0])
        figures = measure(sets, world=world, actor=engine)
        asked.append(engine.num_requests)
        return figures

    found = in_world(size, act)
    assert all(figures == found[0] for figures in found)
    assert found[0] == measure(sets)
    assert sum(asked) == (5 + 1) * 5 and max(asked) < (5 + 1) * 5


def failing(monkeypatch: pytest.MonkeyPatch, reason: str, every: int) -> None:
    """Have every so many replies come back as ones that no grader got through."""
    from recipes.evaluation import measure as module

    score = module.score

    def failing_score(*args: Any, **kwargs: Any) -> Any:
        number = 0
        groups = []
        for group in score(*args, **kwargs):
            trajectories = []
            for t in group.trajectories:
                failed = reason if number % every == 0 else ""
                trajectories.append(dataclasses.replace(t, failed=failed))
                number += 1
            groups.append(dataclasses.replace(group, trajectories=tuple(trajectories)))
        return groups

    monkeypatch.setattr(module, "score", failing_score)


def test_replies_that_could_not_be_graded_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "too slow", every=3)
    figures = measure([eval_set("heldout")])
    assert figures["eval/heldout/num_failed"] == 2 + 8


def test_a_set_of_which_nothing_could_be_graded_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing(monkeypatch, "too slow", every=1)
    with pytest.raises(
        GradingFailed, match=r"6 greedy replies to heldout none could be graded \(too slow\)"
    ):
        measure([eval_set("heldout")])
