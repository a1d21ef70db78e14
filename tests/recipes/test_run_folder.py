"""Files of a run: appended by step, cut back on resumption."""

from __future__ import annotations

import json
from pathlib import Path

from recipes.run_folder import RunFolder, default_path
from tests.helpers.trajectories import random_groups


def folder_with_steps(tmp_path: Path, num: int) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    for step in range(1, num + 1):
        row = {"step": step, "reward": step / 10}
        folder.append_metrics({**row, "eval/accuracy": 0.5} if step == 2 else row)
        folder.append_samples(step, random_groups(3, 2, vocab=5))
    return folder


def test_truncate_drops_later_steps_and_torn_lines(tmp_path: Path) -> None:
    folder = folder_with_steps(tmp_path, 4)
    with folder.metrics_path.open("a") as file:
        file.write('{"step": 5, "rew')
    folder.truncate(2)
    assert [row["step"] for row in folder.read_metrics()] == [1, 2]
    samples = folder.samples_path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples] == [1, 1, 2, 2]


def test_an_empty_run_can_be_cut(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new")
    folder.truncate(0)
    assert folder.read_metrics() == []


def test_the_curve_is_a_picture(tmp_path: Path) -> None:
    folder = folder_with_steps(tmp_path, 3)
    folder.draw_curve("largest", 0.2)
    assert (folder.path / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_default_paths_name_the_task() -> None:
    assert default_path("gym:chain_sum").name.endswith("-gym-chain_sum")
    assert default_path("data/sums.jsonl").name.endswith("-sums")
