"""Asynchronous training over an engine in a process of its own, which samples while the trainer
computes; what is asserted does not depend on how fast either is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from recipes.actors.launch import launch_actor
from recipes.grpo import train
from recipes.settings.options import PlacementOptions
from tests.helpers.async_runs import async_options, open_char_run, untimed
from tests.helpers.char_model import char_model, write_char_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 4


def test_a_run_goes_on_where_it_was_cut_with_what_was_sampled(tmp_path: Path) -> None:
    """Two steps, a checkpoint with replies under way, and two more by another pair of processes."""
    write_char_model(tmp_path / "char", char_model(16, 1))
    options = async_options(
        tmp_path / "run",
        staleness=2,
        engine_steps=0,
        eval_every=0,
        checkpoint_every=2,
        model=str(tmp_path / "char"),
        device="cpu",
        dtype="float32",
        placement=PlacementOptions(rollout_gpus=1),
    )
    for steps in (2, STEPS):
        resume = options.out if steps == STEPS else None
        given = dataclasses.replace(options, steps=steps, resume=resume)
        actor = launch_actor(given)
        with open_char_run(given, tmp_path, actor=actor) as run:
            run.begin()
            train(run)
            run.finish()
            assert actor.state().version == steps
        under_way = [group.position for group in (*run.surplus, *run.unfinished)]
        trained = set(range(run.progress.position)) - set(under_way)
        assert len(trained) == 3 * steps, "a group was lost, or trained twice"

    rows = untimed(run)
    assert [row["weight_version"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["async/age_max"] == 0
    # Nine groups are started with the first weights: the second batch has tokens of theirs.
    assert rows[1]["async/age_max"] == 1
    assert rows[0]["async/engine_wait_s"] > 0, "it waited for the first request at least"
    for row in rows:
        assert row["async/groups_in_flight"] + row["async/groups_ready"] <= 9
