"""A folder that was pulled into counts as a version of what published it, and of nothing else."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine.errors import ModelNotFound
from rollout.http.updates.pull import STATE_FOLDER, pull
from tests.rollout.http.updates.test_pull import Run, weights, write_delta, zstandard

__all__ = ["zstandard"]


class OtherTrainer:
    """Publishes versions of its own into another folder, or over those of the first."""

    def __init__(self, run: Run, path: Path, encoding: str) -> None:
        self.run, self.source = run, path / "other"
        # Tensor "d" is what the first trainer never had, and no delta after 1 names it.
        self.versions = [run.versions[0]] + [weights(seed) for seed in (11, 12, 13)]
        for version in (2, 3):
            self.versions[version]["d"] = self.versions[1]["d"]
        for version in (1, 2, 3):
            write_delta(self.source, version, *self.versions[version - 1 : version + 1], encoding)

    def pull(self, version: int) -> None:
        pull(self.run.local, source=self.source, base=self.run.base, version=version)

    def check(self, version: int) -> None:
        mine, self.run.versions = self.run.versions, self.versions
        self.run.check(version)
        self.run.versions = mine


@pytest.fixture(params=["xor", "overwrite"])
def two(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Run, OtherTrainer]:
    run = Run(tmp_path, request.param)
    return run, OtherTrainer(run, tmp_path, request.param)


@pytest.mark.parametrize("held,wanted", [(1, 1), (1, 2), (2, 3), (3, 1)])
def test_another_trainers_version_of_the_same_number(two, held: int, wanted: int, caplog) -> None:
    run, other = two
    run.pull(held)
    with caplog.at_level(logging.WARNING, "rollout.http.updates.pull"):
        other.pull(wanted)
    other.check(wanted)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    run.pull(wanted)
    run.check(wanted)


def test_a_trainer_that_was_started_again_publishes_over_its_folders(two) -> None:
    run, other = two
    run.pull(2)
    shutil.rmtree(run.source)
    other.source.rename(run.source)
    other.source = run.source
    other.pull(3)
    other.check(3)


def test_a_version_that_was_taken_back_is_trusted_in_its_own_folder_alone(two) -> None:
    run, other = two
    run.pull(2)
    for source in (run.source, other.source):
        shutil.rmtree(source / "weight_v000002")
    run.pull(2)
    run.pull(3)
    run.check(3)
    with pytest.raises(ModelNotFound, match="weight_v000002"):
        other.pull(3)


def test_a_version_zero_of_another_model(two, tmp_path: Path) -> None:
    run, _ = two
    run.pull(0)
    shutil.copytree(run.base, tmp_path / "second")
    path = next((tmp_path / "second").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-4:] = np.float32(7).tobytes()
    path.write_bytes(data)
    pull(run.local, source=None, base=tmp_path / "second", version=0)
    assert (run.local / path.name).read_bytes() == bytes(data)


def test_a_state_that_another_program_wrote_says_nothing_of_its_origin(two) -> None:
    run, _ = two
    run.pull(1)
    state = run.local / STATE_FOLDER / "state.json"
    assert json.loads(state.read_text())["version"] == "000001"
    state.write_text('{"version": "000001"}')
    path = next(run.local.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-4:] = np.float32(7).tobytes()
    path.write_bytes(data)
    run.pull(1)
    run.check(1)
