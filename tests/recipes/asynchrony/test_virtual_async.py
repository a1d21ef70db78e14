"""Asynchronous runs in one process: synchronous at staleness 0, one for a seed, resumed whole."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.algorithms.presets import AlgorithmOptions
from recipes.run.report import Collected
from recipes.run.run import Run
from recipes.types import Group
from tests.helpers.async_runs import async_options, go, untimed, weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_plots")]


def same_weights(run: Run, other: Run) -> bool:
    return all(torch.equal(*pair) for pair in zip(weights(run), weights(other), strict=True))


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "remax"])
def test_staleness_0_is_the_synchronous_run_bit_for_bit(tmp_path: Path, algorithm) -> None:
    objective = AlgorithmOptions(algorithm=algorithm)
    sync, asynchronous = (
        go(async_options(tmp_path / name, staleness=staleness, objective=objective), tmp_path)
        for name, staleness in (("sync", None), ("async", 0))
    )
    for row, expected in zip(untimed(asynchronous), untimed(sync), strict=True):
        assert {key: row[key] for key in expected} == expected
    assert same_weights(sync, asynchronous)


def test_a_seed_gives_one_run_whose_replies_go_on_over_updates(tmp_path: Path) -> None:
    runs = [go(async_options(tmp_path / name), tmp_path) for name in "ab"]
    rows = untimed(runs[0])
    assert rows == untimed(runs[1])
    assert same_weights(*runs)
    assert rows[0]["async/staleness_max"] == 0 and rows[-1]["async/staleness_max"] == 2
    assert max(row["async/versions_per_sample"] for row in rows) > 1.5
    for row in rows:
        shares = [value for name, value in row.items() if name.startswith("async/lag_share/")]
        assert sum(shares) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "changes",
    [{}, {"objective": AlgorithmOptions(algorithm="dapo")}],
    ids=["grpo", "dapo"],
)
def test_a_resumed_run_has_all_that_was_sampled_of_the_killed_one(
    tmp_path: Path, changes: dict[str, AlgorithmOptions]
) -> None:
    """Replies go on behind the tokens that they had: nothing is sampled twice, and the steps are
    those of the run that was never cut."""
    kept = {"checkpoint_every": 3, "eval_every": 0, **changes}
    unbroken = go(async_options(tmp_path / "a", **kept), tmp_path)
    options = async_options(tmp_path / "b", **kept)
    first = go(dataclasses.replace(options, steps=3), tmp_path)
    assert first.unfinished, "nothing was under way at the checkpoint"
    assert any(len(o.token_ids) for group in first.unfinished for o in group.outputs.values())
    resumed = go(dataclasses.replace(options, resume=options.out), tmp_path)
    assert untimed(resumed) == untimed(unbroken)
    assert same_weights(resumed, unbroken)


class Watched:
    """Notes every batch of a run, and every group that was sampled for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[Group]] = []
        self.sampled: list[Group] = []
        finish = Run.finish_step

        def noted(run: Run, collected: Collected, *rest: Any) -> None:
            self.batches.append(collected.groups)
            self.sampled += collected.sampled
            finish(run, collected, *rest)

        monkeypatch.setattr(Run, "finish_step", noted)

    @property
    def positions(self) -> list[int]:
        return [group.position for batch in self.batches for group in batch]


@pytest.mark.parametrize("strict", [False, True])
def test_nothing_is_discarded_and_the_oldest_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    watched = Watched(monkeypatch)
    options = async_options(tmp_path / "run", staleness=2, engine_steps=1)
    given = dataclasses.replace(options.asynchrony, strict_age=strict)
    run = go(dataclasses.replace(options, asynchrony=given, eval_every=0, steps=8), tmp_path)
    trained = watched.positions
    waiting = [group.position for group in run.surplus]
    unfinished = [group.position for group in run.unfinished]
    assert sorted([*trained, *waiting, *unfinished]) == list(range(run.progress.position))
    for batch in watched.batches:
        assert all(a.position < b.position for a, b in pairwise(batch))
    if strict:
        assert trained == sorted(trained)
        assert max(row["async/age_max"] for row in untimed(run)) == 2


def test_what_has_no_spread_is_counted_and_what_is_too_much_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    objective = AlgorithmOptions(algorithm="dapo")
    run = go(async_options(tmp_path / "run", staleness=1, objective=objective), tmp_path)
    dropped = {group.position for group in watched.sampled if not group.mixed}
    assert dropped and dropped.isdisjoint(watched.positions)
    rows = untimed(run)
    assert sum(row["async/groups_filtered"] for row in rows) == len(dropped)
    assert all(len(batch) == 3 for batch in watched.batches)


@pytest.mark.parametrize("stale_kv", ["keep", "recompute"])
def test_the_kv_of_replies_under_way_is_kept_or_computed_again(
    tmp_path: Path, stale_kv: str
) -> None:
    options = async_options(tmp_path / "run", steps=3, eval_every=0)
    given = dataclasses.replace(options.asynchrony, stale_kv=stale_kv)
    run = go(dataclasses.replace(options, asynchrony=given), tmp_path)
    retracted = run.actor.state().num_retractions
    assert (retracted > 0) == (stale_kv == "recompute")


def test_a_decoupled_run_weights_by_what_has_changed_since_a_token_was_sampled(
    tmp_path: Path,
) -> None:
    options = async_options(
        tmp_path / "run",
        eval_every=0,
        objective=AlgorithmOptions(algorithm="grpo", is_level="token", is_mode="zero", is_cap=5.0),
    )
    given = dataclasses.replace(options.asynchrony, bypass=False)
    rows = untimed(go(dataclasses.replace(options, asynchrony=given), tmp_path))
    # Updates of 1e-2 change probabilities that older tokens are weighted by; fresh ones are 1.
    name = "sampling/importance_sampling_ratio/"
    assert rows[0][name + "max"] == pytest.approx(1.0, abs=1e-3)
    assert max(row[name + "max"] for row in rows) > 1.05
    assert min(row[name + "min"] for row in rows) < 0.95
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-3
