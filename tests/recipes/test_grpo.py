"""The whole loop with a tiny model and the fake engine: it learns, it resumes, it adds up."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.errors import GradingFailed, InvalidRequest
from recipes.actors.scorer import ScoringEngine, scoring_config
from recipes.algorithms.presets import AlgorithmName, AlgorithmOptions
from recipes.environments.base import Environment
from recipes.grpo import main, train, update
from recipes.rewards.base import Failed, Grade, Item
from recipes.rewards.graders.worker import GraderSpec
from recipes.rewards.reward_options import RewardOptions
from recipes.run.ledger import Ledger
from recipes.run.opening import assemble
from recipes.run.report import PHASES
from recipes.run.run import Run
from recipes.settings.options import RolloutOptions, RunOptions
from recipes.trainers.loss_scale import FIRST_POWER
from recipes.trainers.optimizer_options import OptimizerOptions
from recipes.trainers.plain import Trainer
from tests.helpers.char_model import CharAddition, char_model, char_tokenizer, write_char_model
from tests.helpers.engines import make_replica
from tests.helpers.fake_actor import FakeActor

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_plots")]


class LeadingDigit(CharAddition):
    """A reward that a random model can find: the reply begins with a digit."""

    def verify(self, reply: str, problem: Any) -> float:
        return float(reply[:1].isdigit())


def make_options(tmp_path: Path, **changes: Any) -> RunOptions:
    options = RunOptions(
        out=str(tmp_path / "run"),
        steps=4,
        eval_every=2,
        eval_prompts=4,
        checkpoint_every=2,
        rollout=RolloutOptions(prompts_per_step=3, samples=4, max_new_tokens=3),
        optimizer=OptimizerOptions(lr=1e-2),
    )
    return dataclasses.replace(options, **changes)


def make_run(
    options: RunOptions,
    noise: float = 0.0,
    environment: Environment | None = None,
    reference: ScoringEngine | None = None,
    trainer: type[Trainer] = Trainer,
    dtype: torch.dtype = torch.float32,
) -> Run:
    model = char_model(16, 1)
    return assemble(
        options,
        Ledger(),
        environment=environment or LeadingDigit(),
        actor=FakeActor(model, [0], noise),
        tokenizer=char_tokenizer(),
        trainer=trainer(
            model,
            options.optimizer,
            device=torch.device("cpu"),
            dtype=dtype,
            temperature=options.rollout.temperature,
            reference=copy.deepcopy(model) if _has_reference(options) else None,
        ),
        reference=reference,
    )


def _has_reference(options: RunOptions) -> bool:
    return options.objective.kl_coef > 0 and options.objective.reference != "engine"


def go(options: RunOptions, noise: float = 0.0) -> tuple[Run, dict[str, Any]]:
    run = make_run(options, noise)
    with run.display:
        run.begin()
        train(run)
        summary = run.finish()
    run.folder.close()
    return run, summary


def rows(run: Run) -> list[dict[str, Any]]:
    return run.folder.read_metrics()


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    timed = ("timing_s/", "perf/rollout_tokens_per_s", "push/")
    return {key: value for key, value in row.items() if not key.startswith(timed)}


def test_the_reward_goes_up_and_the_folder_is_complete(tmp_path: Path) -> None:
    run, summary = go(make_options(tmp_path, steps=12, checkpoint_every=0))
    rewards = [row["reward"] for row in rows(run)]
    assert sum(rewards[-3:]) > sum(rewards[:3])
    assert summary["eval_after"] == 1.0
    on_disk = json.loads((run.folder.path / "summary.json").read_text())
    assert on_disk == summary
    assert {"task", "seed", "steps", "seconds", "eval_before", "eval_after", "model", "device"} <= (
        on_disk.keys()
    )
    names = (
        "config.json",
        "metrics.jsonl",
        "samples.jsonl",
        "rollouts.jsonl",
        "plots.png",
        "model",
    )
    for name in names:
        assert (run.folder.path / name).exists(), name


def test_the_saved_model_is_the_trained_one(tmp_path: Path) -> None:
    run, _ = go(make_options(tmp_path, steps=2))
    loaded = AutoModelForCausalLM.from_pretrained(run.folder.model)
    for (name, a), b in zip(loaded.named_parameters(), run.trainer.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    tokenizer = AutoTokenizer.from_pretrained(run.folder.model)
    assert tokenizer.encode("12+34=") == char_tokenizer().encode("12+34=")


def test_every_row_has_its_figures_and_its_times_add_up(tmp_path: Path) -> None:
    run, summary = go(make_options(tmp_path, objective=AlgorithmOptions(kl_coef=0.1)), noise=0.01)
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]
    for row in rows(run):
        phases = [row[f"timing_s/{p}"] for p in PHASES]
        assert sum(phases) == pytest.approx(row["timing_s/step"], rel=1e-9)
        assert row["weight_version"] == row["step"]
        assert ("eval/accuracy" in row) == (row["step"] % 2 == 0)
        difference = row["sampling/sampling_logp_difference/mean"]
        assert difference == pytest.approx(0.01, rel=0.05)
        for name in ("entropy", "kl", "grad_norm", "learning_rate", "frac_reward_zero_std"):
            assert name in row
    assert "push/memcpy_seconds" in rows(run)[0]
    assert summary["seconds"] == pytest.approx(sum(summary["seconds_by_phase"].values()))


class OverflowsOnce(Trainer):
    """Its second gradient is infinite."""

    num_steps = 0

    def step(self, lr: float) -> float:
        self.num_steps += 1
        if self.num_steps == 2:
            gradient = self.masters.parameters[0].grad
            assert gradient is not None
            gradient[0] = float("inf")
        return super().step(lr)


def test_a_skipped_step_is_counted_and_its_version_published(tmp_path: Path) -> None:
    """Every step has a version of its own, so that a run can be resumed by the number of its step;
    the one of a skipped step has the weights of that before it."""
    run = make_run(make_options(tmp_path), trainer=OverflowsOnce, dtype=torch.float16)
    with run.display:
        run.begin()
        train(run)
        run.finish()
    run.folder.close()
    figures = rows(run)
    assert [row["weight_version"] for row in figures] == [1, 2, 3, 4]
    assert [row["train/skipped_steps"] for row in figures] == [0, 1, 1, 1]
    assert [row["train/loss_scale"] for row in figures] == [
        2.0**FIRST_POWER,
        *[2.0 ** (FIRST_POWER - 1)] * 3,
    ]
    assert [row["grad_norm"] > 0 for row in figures] == [True, False, True, True]
    assert run.actor.version == run.progress.step == 4


def test_killed_and_resumed_equals_unbroken(tmp_path: Path) -> None:
    unbroken, expected = go(make_options(tmp_path / "a", steps=7))
    options = make_options(tmp_path / "b", steps=7)
    killed = make_run(options)
    killed.begin()
    push, pushes = killed.actor.push, 0

    def dying_push(*args: Any, **kwargs: Any) -> Any:
        nonlocal pushes
        pushes += 1
        if pushes == 6:
            raise KeyboardInterrupt
        return push(*args, **kwargs)

    killed.actor.push = dying_push  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train(killed)
    assert len(rows(killed)) == 5
    killed.folder.close()  # the kernel does it for a process that is killed

    resumed, summary = go(dataclasses.replace(options, resume=options.out))
    assert [untimed(r) for r in rows(resumed)] == [untimed(r) for r in rows(unbroken)]
    kept = unbroken.folder.rollouts_path.read_bytes()
    assert kept and resumed.folder.rollouts_path.read_bytes() == kept
    for key in ("steps", "eval_before", "eval_after", "best"):
        assert summary[key] == expected[key]
    for a, b in zip(
        resumed.trainer.model.parameters(), unbroken.trainer.model.parameters(), strict=True
    ):
        assert torch.equal(a, b)


def test_killed_before_the_first_checkpoint_starts_again(tmp_path: Path) -> None:
    unbroken, _ = go(make_options(tmp_path / "a", steps=2, checkpoint_every=0))
    options = make_options(tmp_path / "b", steps=1, checkpoint_every=0)
    go(options)
    resumed, _ = go(dataclasses.replace(options, resume=options.out, steps=2))
    assert [untimed(r) for r in rows(resumed)] == [untimed(r) for r in rows(unbroken)]


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    options = make_options(tmp_path, steps=0)
    go(options)
    with pytest.raises(InvalidRequest, match="--resume"):
        make_run(options)


def test_dynamic_sampling_trains_on_mixed_groups_only(tmp_path: Path) -> None:
    options = make_options(tmp_path, objective=AlgorithmOptions(algorithm="dapo"))
    run = make_run(options)
    run.begin()
    from recipes.grpo import collect

    got = collect(run)
    assert all(group.mixed for group in got.groups)
    assert len(got.sampled) % 3 == 0
    assert run.progress.position == len(got.sampled)


def test_groups_sampled_beyond_a_step_are_trained_on_first_in_the_next(tmp_path: Path) -> None:
    from recipes.grpo import collect

    objective = AlgorithmOptions(algorithm="dapo")
    run = make_run(make_options(tmp_path / "a", objective=objective))
    run.begin()
    seen: list[Any] = []
    sampled: list[Any] = []
    surplus = False
    for _ in range(6):
        waiting = list(run.surplus)
        got = collect(run)
        surplus |= bool(run.surplus)
        assert got.groups[: len(waiting)] == waiting
        seen += got.groups
        sampled += [group for group in got.sampled if group.mixed]
    assert surplus, "no step sampled more than it needed"
    assert [id(group) for group in [*seen, *run.surplus]] == [id(group) for group in sampled]


def test_a_resumed_run_has_the_surplus_of_the_killed_one(tmp_path: Path) -> None:
    objective = AlgorithmOptions(algorithm="dapo")
    unbroken, _ = go(make_options(tmp_path / "a", steps=6, objective=objective))
    options = make_options(tmp_path / "b", steps=4, objective=objective)
    go(options)
    resumed, _ = go(dataclasses.replace(options, resume=options.out, steps=6))
    assert [untimed(r) for r in rows(resumed)] == [untimed(r) for r in rows(unbroken)]


class Beside(LeadingDigit):
    """The same reward from a process beside the run, which some replies end."""

    grader = GraderSpec(function="tests.helpers.odd_graders:leading_digit", sample=("1",))

    def grading(self, reply: str, problem: Any) -> tuple[str, ...]:
        return (reply,)


def test_replies_that_no_grader_gets_through_are_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewards = RewardOptions(max_failed_share=1.0)
    objective = AlgorithmOptions(algorithm="grpo")
    options = make_options(tmp_path, checkpoint_every=0, rewards=rewards, objective=objective)
    with caplog.at_level(logging.INFO), make_run(options, environment=Beside()) as run:
        run.begin()
        train(run)
    ungraded = [row["completions/num_ungraded"] for row in rows(run)]
    assert sum(ungraded) > 0
    for row, num in zip(rows(run), ungraded, strict=True):
        assert row.get("rewards/failed/raised", 0.0) == num
        assert row["rewards/failed_share"] == num / 12
    assert "replies not graded, and left out" in caplog.text
    assert "raised: raised ValueError: no digit" in caplog.text


@pytest.mark.parametrize("kl_coef,num_iterations", [(0.0, 1), (0.1, 2)])
def test_a_reward_that_fails_ends_the_run_by_its_name(
    tmp_path: Path, kl_coef: float, num_iterations: int
) -> None:
    """Steps with nothing to learn from come before: they leave the weights as they are."""
    objective = AlgorithmOptions(algorithm="grpo", kl_coef=kl_coef, num_iterations=num_iterations)
    options = make_options(tmp_path, checkpoint_every=0, eval_every=0, objective=objective)
    run = make_run(options)
    run.begin()
    before = copy.deepcopy(run.trainer.model.state_dict())

    def fail(items: Sequence[Item]) -> list[Grade]:
        return [Failed(kind="http", reason="no route to it")] * len(items)

    run.grading = fail  # type: ignore[assignment]
    with pytest.raises(GradingFailed, match="40% of the replies of the last 5 steps") as caught:
        train(run)
    assert "12 http" in str(caught.value) and "no route to it" in str(caught.value)
    assert [row["rewards/failed_share"] for row in rows(run)] == [1.0, 1.0]
    after = run.trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    run.folder.close()


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_a_resumed_run_goes_on_with_the_weight_of_the_kl(tmp_path: Path, place: Any) -> None:
    """And with the mean of the rewards so far."""
    objective = AlgorithmOptions(
        algorithm="reinforce++",
        kl_coef=0.1,
        kl_in=place,
        kl_controller="adaptive",
        kl_target=1e-4,
        kl_horizon=50,
        normalise_rewards=True,
    )
    unbroken, _ = go(make_options(tmp_path / "a", steps=5, objective=objective))
    told = rows(unbroken)
    assert told[0]["kl_coef"] == 0.1 and told[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    num = told[1]["kl"] * told[1]["perf/trained_response_tokens"]
    error = min(max(num / 12 / 1e-4 - 1, -0.2), 0.2)
    assert told[2]["kl_coef"] == pytest.approx(told[1]["kl_coef"] * (1 + error * 12 / 50))
    assert len({row["kl_coef"] for row in told}) == 5

    options = make_options(tmp_path / "b", steps=3, checkpoint_every=3, objective=objective)
    go(options)
    resumed, _ = go(dataclasses.replace(options, resume=options.out, steps=5))
    assert rows(resumed)[4]["kl_coef"] == told[4]["kl_coef"]
    assert resumed.progress == dataclasses.replace(
        unbroken.progress, seconds=resumed.progress.seconds
    )
    for a, b in zip(
        resumed.trainer.model.parameters(), unbroken.trainer.model.parameters(), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_an_engine_is_as_good_a_reference_as_the_trainer(
    tmp_path: Path, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_char_model(tmp_path / "model", char_model(16, 1))

    def open_engine() -> ScoringEngine:
        return ScoringEngine(
            scoring_config(RunOptions(), "unused", kv_memory_gb=1.0),
            option="reference",
            temperature=1.0,
            launch=lambda: make_replica(tmp_path / "model"),
        )

    told, closed = [], []
    for where in ("copy", "engine"):
        options = make_options(
            tmp_path / where,
            steps=3,
            checkpoint_every=0,
            eval_every=0,
            objective=AlgorithmOptions(kl_coef=0.1, kl_in=place, reference=where),
        )
        engine = open_engine() if where == "engine" else None
        if engine is not None:
            monkeypatch.setattr(engine, "close", lambda where=where: closed.append(where))
        with make_run(options, reference=engine) as run:
            run.begin()
            train(run)
        told.append([row["kl"] for row in rows(run)])
    assert told[1] == pytest.approx(told[0], abs=1e-5) and told[0][2] != 0
    assert closed == ["engine"]


@pytest.mark.parametrize("name", ["reinforce++", "reinforce++-baseline", "remax", "rloo"])
def test_what_no_group_norm_divides_learns_too(tmp_path: Path, name: Any) -> None:
    options = make_options(
        tmp_path,
        steps=12,
        checkpoint_every=0,
        eval_every=0,
        objective=AlgorithmOptions(algorithm=name),
    )
    run, summary = go(options)
    rewards = [row["reward"] for row in rows(run)]
    assert sum(rewards[-3:]) > sum(rewards[:3]) and summary["eval_after"] == 1.0


def test_one_sample_a_problem_is_no_collapse(tmp_path: Path) -> None:
    options = make_options(
        tmp_path,
        steps=8,
        checkpoint_every=0,
        rollout=RolloutOptions(prompts_per_step=12, samples=1, max_new_tokens=3),
        objective=AlgorithmOptions(algorithm="reinforce++"),
    )
    run, _ = go(options)
    assert all(row["frac_reward_zero_std"] == float(row["reward"] in (0, 1)) for row in rows(run))
    assert any(row["grad_norm"] > 0 for row in rows(run))


def test_the_greedy_reply_is_sampled_and_graded_but_not_trained_on(tmp_path: Path) -> None:
    from recipes.grpo import collect

    run = make_run(make_options(tmp_path, objective=AlgorithmOptions(algorithm="remax")))
    run.begin()
    before = run.actor.num_requests  # type: ignore[attr-defined]
    got = collect(run)
    assert run.actor.num_requests - before == 3 * (4 + 1)  # type: ignore[attr-defined]
    for group in got.groups:
        assert len(group.trajectories) == 4 and group.greedy is not None
        graded = run.environment.verify(group.greedy.text, group.problem)
        assert group.greedy.correct == graded
    figures = update(run, got.groups)
    assert figures["perf/trained_response_tokens"] == sum(
        len(t.response_ids) for group in got.groups for t in group.trajectories
    )


@pytest.mark.parametrize("name", sorted({*get_args(AlgorithmName)} - {"grpo", "ppo", "opd"}))
def test_every_algorithm_runs(tmp_path: Path, name: Any) -> None:
    algorithm = AlgorithmOptions(algorithm=name, is_level="sequence")
    run, _ = go(make_options(tmp_path, steps=1, objective=algorithm, checkpoint_every=0))
    assert rows(run)[0]["grad_norm"] >= 0


def test_several_updates_on_one_batch_clip_against_the_first_policy(tmp_path: Path) -> None:
    algorithm = AlgorithmOptions(num_iterations=3, num_minibatches=2, clip_low=0.01, clip_high=0.01)
    run, _ = go(make_options(tmp_path, steps=2, objective=algorithm, checkpoint_every=0))
    assert max(row["clip_ratio/region_mean"] for row in rows(run)) > 0
    for row in rows(run):
        assert row["sampling/sampling_logp_difference/max"] < 1e-4


def test_minutes_end_a_run_between_steps(tmp_path: Path) -> None:
    _, summary = go(make_options(tmp_path, steps=10_000, minutes=1e-6))
    assert summary["steps"] == 0


def test_a_reward_that_cannot_be_is_told_before_the_model_is_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "mine.py"
    assert main(["--reward", f"{missing}:score", "--model", str(tmp_path / "none")]) == 2
    assert (
        capsys.readouterr().err == f"InvalidRequest (reward): reward: there is no file {missing}\n"
    )


def test_a_mistake_is_one_line_and_exit_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--steps", "-3"]) == 2
    assert capsys.readouterr().err == "InvalidRequest (steps): steps must be at least 0, not -3\n"
