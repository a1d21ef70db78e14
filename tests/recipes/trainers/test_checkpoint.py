"""Checkpoints: whole or absent, RNGs included."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes.trainers import checkpoint
from recipes.trainers.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint


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

    monkeypatch.setattr(checkpoint, "_sync", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, write, {"step": 2})
    assert latest_checkpoint(tmp_path) == first
    monkeypatch.undo()
    second = save_checkpoint(tmp_path, 2, write, {"step": 2})
    assert latest_checkpoint(tmp_path) == second
    assert load_checkpoint(second, lambda folder: None) == ({"step": 2}, [])
