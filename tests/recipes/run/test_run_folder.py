"""Files of a run: appended by step, cut back on resumption."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import InvalidRequest
from recipes.run.opening import open_folder
from recipes.run.run_folder import RunFolder, default_path
from recipes.settings.options import RunOptions
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


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    assert first.claim() and first.claim()
    assert not second.claim()
    assert RunFolder(tmp_path, active=False).claim()
    first.close()
    assert second.claim()
    with pytest.raises(InvalidRequest, match="another run is writing") as caught:
        open_folder(RunOptions(resume=str(tmp_path)))
    assert caught.value.field == "out"
    second.close()
    open_folder(RunOptions(resume=str(tmp_path))).close()


def test_a_run_that_ends_gives_its_folder_back(tmp_path: Path) -> None:
    held = "from pathlib import Path; import sys; from recipes.run.run_folder import RunFolder\n"
    held += "assert RunFolder(Path(sys.argv[1])).claim(); print(flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", held, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        folder = RunFolder(tmp_path)
        assert not folder.claim()
        other.kill()
        other.wait()
        assert folder.claim()
    folder.close()


def test_an_empty_run_can_be_cut(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new")
    folder.truncate(0)
    assert folder.read_metrics() == []
    assert [path.name for path in folder.path.iterdir()] == ["metrics.jsonl"]


def test_the_curve_is_a_picture(tmp_path: Path) -> None:
    folder = folder_with_steps(tmp_path, 3)
    folder.draw_plots()
    assert (folder.path / "plots.png").read_bytes().startswith(b"\x89PNG")


def test_default_paths_name_the_task() -> None:
    assert default_path("gym:chain_sum").name.endswith("-gym-chain_sum")
    assert default_path("data/sums.jsonl").name.endswith("-sums")


def test_what_json_has_no_number_for_is_null_and_a_run_goes_on_from_it(tmp_path: Path) -> None:
    folder = folder_with_steps(tmp_path, 1)
    folder.append_metrics({"step": 2, "loss": float("nan"), "ratio": float("inf"), "reward": 1.0})
    folder.truncate(2)
    assert folder.read_metrics()[1] == {"step": 2, "loss": None, "ratio": None, "reward": 1.0}


def test_a_reply_without_a_grade_has_no_reward_among_the_samples(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (group,) = random_groups(1, 2, vocab=5)
    lost = dataclasses.replace(group.trajectories[0], failed="raised: x", reward=0.0)
    replies = (lost, *group.trajectories[1:])
    folder.append_samples(1, [dataclasses.replace(group, trajectories=replies)])
    row = json.loads(folder.samples_path.read_text())
    assert row["rewards"][0] is None and row["failed"] == ["raised: x", ""]
    assert row["rewards"][1] == group.trajectories[1].reward
