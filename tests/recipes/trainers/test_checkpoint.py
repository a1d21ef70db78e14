"""Checkpoints: whole or absent, RNGs included."""

from __future__ import annotations

import dataclasses
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine.errors import DiskFull
from recipes.algorithms.presets import preset
from recipes.collecting.batching import make_batch, minibatches
from recipes.run.saving import together
from recipes.trainers import checkpoint
from recipes.trainers.checkpoint import (
    checkpoint_bytes,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from recipes.trainers.optimizer_options import OptimizerOptions
from recipes.trainers.plain import Trainer
from recipes.trainers.route_shelf import RouteShelf
from recipes.types import Group
from recipes.world import World
from tests.helpers.char_model import char_model
from tests.helpers.file_limit import largest_file
from tests.helpers.trajectories import random_groups


def write(folder: Path) -> None:
    (folder / "t").write_text("weights")


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def test_round_trip_restores_tensors_progress_and_generators(tmp_path: Path) -> None:
    saved = save_checkpoint(tmp_path, 3, write, {"position": 24})
    expected = draw()
    draw()
    read: list[str] = []
    progress, _ = load_checkpoint(saved, lambda folder: read.append((folder / "t").read_text()))
    assert draw() == expected
    assert progress == {"position": 24}
    assert read == ["weights"]


def test_surplus_groups_are_dealt_into_minibatches_as_before(tmp_path: Path) -> None:
    """Whole, which the samples' one prompt array tells; the greedy reply comes back too."""
    groups = random_groups(4, 3, vocab=9)
    groups[0] = dataclasses.replace(groups[0], greedy=groups[0].trajectories[1])
    saved = save_checkpoint(tmp_path, 1, write, {}, surplus=groups)
    _, surplus = load_checkpoint(saved, lambda _: None)
    algorithm = dataclasses.replace(preset("grpo", 8), num_minibatches=2)

    def deal(groups: list[Group]) -> list[list[list[int]]]:
        parts = minibatches(make_batch(groups, algorithm, 8), algorithm, 8, seed=0)
        return [[t.response_ids.tolist() for t in part.trajectories] for part in parts]

    assert deal(surplus) == deal(groups)
    assert surplus[0].greedy is not None and surplus[1].greedy is None


def test_only_the_last_one_is_kept(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    for step in (1, 2, 10):
        last = save_checkpoint(tmp_path, step, write, {"step": step})
    assert latest_checkpoint(tmp_path) == last
    assert [p.name for p in tmp_path.iterdir()] == ["step_000010"]


def test_a_kill_while_writing_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save_checkpoint(tmp_path, 1, write, {"step": 1})

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "sync", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, write, {"step": 2})
    assert latest_checkpoint(tmp_path) == first
    monkeypatch.undo()
    second = save_checkpoint(tmp_path, 2, write, {"step": 2})
    assert latest_checkpoint(tmp_path) == second
    assert load_checkpoint(second, lambda folder: None) == ({"step": 2}, [])


def save_tensors(folder: Path) -> None:
    torch.save({"a": torch.zeros(100_000)}, folder / "trainer.pt")


def test_a_full_disk_is_named_and_the_one_before_stays(tmp_path: Path) -> None:
    first = save_checkpoint(tmp_path, 1, write, {"step": 1})
    with largest_file(100_000), pytest.raises(DiskFull) as caught:
        save_checkpoint(tmp_path, 2, save_tensors, {"step": 2}, num_bytes=400_000)
    told = str(caught.value)
    assert str(tmp_path / "step_000002") in told
    assert "400,000 bytes" in told and "are free there" in told
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    assert load_checkpoint(first, lambda folder: None) == ({"step": 1}, [])


def test_a_full_disk_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, write, {"step": 1})
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=1000, f_frsize=1))

    def never(folder: Path) -> None:
        raise AssertionError("the save was begun")

    with pytest.raises(DiskFull, match="about 50,000 bytes, and 1,000 are free"):
        save_checkpoint(tmp_path, 2, never, {"step": 2}, num_bytes=50_000)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_the_size_of_the_one_before_is_the_better_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, save_tensors, {"step": 1})
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=399_999, f_frsize=1))
    with pytest.raises(DiskFull, match="no room"):
        save_checkpoint(tmp_path, 2, save_tensors, {"step": 2}, num_bytes=1)


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    for name in (".writing_step_000001", ".removing_step_000000"):
        (tmp_path / name).mkdir()
    save_checkpoint(tmp_path, 5, write, {"step": 5})
    assert [path.name for path in tmp_path.iterdir()] == ["step_000005"]


def test_the_estimate_is_what_a_trainer_writes(tmp_path: Path) -> None:
    model = char_model(64, 2)
    trainer = Trainer(
        model,
        OptimizerOptions(),
        device=torch.device("cpu"),
        dtype=torch.float32,
        temperature=1.0,
    )
    for parameter in trainer.masters.parameters:
        parameter.grad = torch.ones_like(parameter)
    trainer.step(1e-3)
    saved = save_checkpoint(tmp_path, 1, trainer.save, {})
    written = (saved / "trainer.pt").stat().st_size
    assert checkpoint_bytes(trainer.weights) == pytest.approx(written, rel=0.1)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_full_disk_of_one_process_is_one_of_all(failing: int) -> None:
    """Two threads stand for two processes of a run."""
    with ThreadPoolExecutor(2) as pool:
        meet = Barrier(2)
        parts: list[list[str]] = [[], []]

        class Pair(World):
            def gather(self, items: list[Any]) -> list[Any]:
                parts[self.rank] = items
                meet.wait(120)
                found = parts[0] + parts[1]
                meet.wait(120)
                return found

        def run(rank: int) -> str:
            def part() -> None:
                if rank == failing:
                    raise DiskFull("no room for it")

            with pytest.raises(DiskFull) as caught:
                together(Pair(rank=rank, size=2), part)
            return str(caught.value)

        assert list(pool.map(run, range(2))) == ["no room for it"] * 2


def test_routes_of_surplus_groups_were_in_a_memory_that_is_gone(tmp_path: Path) -> None:
    [group] = random_groups(1, 2, vocab=9)
    held = RouteShelf().put(np.zeros((3, 2, 1), np.uint8))
    routed = tuple(dataclasses.replace(t, routes=held) for t in group.trajectories)
    surplus = [dataclasses.replace(group, trajectories=routed)]
    saved = save_checkpoint(tmp_path, 1, write, {}, surplus=surplus)
    _, [again] = load_checkpoint(saved, lambda _: None)
    assert [t.routes for t in again.trajectories] == [None, None]
