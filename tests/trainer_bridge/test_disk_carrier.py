"""The folder of a push: whole or not there, and there until the engines have answered."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from engine.errors import SlipstreamError, WeightUpdateError
from engine.protocol import BeginUpdate, CommitUpdate, LoadFromDisk, PrepareUpdate
from engine.weights.sources import safetensors
from tests.helpers.engines import make_replica
from tests.helpers.tiny_models import tiny_hf, write_tiny
from tests.trainer_bridge.test_push import logprob_gap
from trainer_bridge.bridge import Publisher, PushOptions
from trainer_bridge.transports import disk
from trainer_bridge.transports.scratch_folder import ScratchFolder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return folder, write_tiny(folder, "qwen2", tie_word_embeddings=True)


def named(seed: int) -> list[tuple[str, torch.Tensor]]:
    model = tiny_hf("qwen2", seed=seed, tie_word_embeddings=True)
    return [(name, p.detach()) for name, p in model.named_parameters()]


@pytest.mark.parametrize("fails", [None, CommitUpdate, PrepareUpdate])
def test_the_folder_is_there_until_the_last_engine_answered(tiny, tmp_path, fails) -> None:
    seen = []

    class Watched:
        def __init__(self, replica) -> None:
            self.replica = replica

        def send(self, command):
            seen.append((type(command), any(tmp_path.glob("*/weight_v000001"))))
            if type(command) is fails:
                raise WeightUpdateError("no", field="x")
            return self.replica.send(command)

    model = tiny_hf("qwen2", seed=1, tie_word_embeddings=True)
    with make_replica(tiny[0]) as one, make_replica(tiny[0]) as two:
        engines = [Watched(one), Watched(two)]
        options = PushOptions(transport="disk", folder=tmp_path)
        with Publisher(model, engines, options) as publisher:
            if fails is None:
                publisher.push(1)
            else:
                with pytest.raises(WeightUpdateError):
                    publisher.push(1)
    there = dict(seen)
    assert there[fails or CommitUpdate] and not there[BeginUpdate]
    assert list(tmp_path.iterdir()) == []


def test_a_killed_trainer_s_folder_goes_with_the_next_and_a_living_one_s_stays(tmp_path) -> None:
    code = """
import pathlib, sys, time
from trainer_bridge.transports.scratch_folder import ScratchFolder
held = ScratchFolder(pathlib.Path(sys.argv[1]))
(held.path / "weight_v000001").mkdir()
print(held.path.name, flush=True)
time.sleep(600)
"""
    (tmp_path / "weights-mine").mkdir()
    with ExitStack() as stack:
        trainers = []
        for _ in range(2):
            started = subprocess.Popen(
                [sys.executable, "-c", code, str(tmp_path)],
                cwd=Path(__file__).resolve().parents[2],
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(started)
            stack.callback(started.kill)
            assert started.stdout is not None
            trainers.append((started, started.stdout.readline().strip()))
        (killed, gone), (_, alive) = trainers
        assert {gone, alive, "weights-mine"} == {path.name for path in tmp_path.iterdir()}
        killed.kill()
        killed.wait()
        next_one = ScratchFolder(tmp_path)
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {alive, "weights-mine", next_one.path.name}
        next_one.close()
        next_one.close()
        assert not next_one.path.exists()


def test_large_models_are_written_in_shards_with_an_index(tiny, tmp_path) -> None:
    new = named(1)
    path = disk.write(tmp_path / "w", new, shard_bytes=20_000)
    files = sorted(file.name for file in path.iterdir())
    assert len(files) > 3 and files[-1] == "model.safetensors.index.json"
    assert files[0].startswith("model-00001-of-")
    read = dict(safetensors.tensors(path))
    assert read.keys() == dict(new).keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in new)
    with make_replica(tiny[0]) as replica:
        disk.load(BeginUpdate(version=1), path, replica)
        model = tiny_hf("qwen2", seed=1, tie_word_embeddings=True)
        assert logprob_gap(replica, model, "r") < 1e-4


@pytest.mark.parametrize("there_before", [False, True])
@pytest.mark.parametrize("stage", ["source", "shard", "sync", "rename"])
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch, stage: str, there_before: bool
) -> None:
    path = tmp_path / "w"
    if there_before:
        disk.write(path, named(1))
    before = {file.name: file.read_bytes() for file in path.iterdir()} if there_before else {}
    source = iter(named(2))

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    if stage == "source":

        def dies():
            yield named(2)[0]
            raise OSError(28, "No space left on device")

        source = dies()
    elif stage == "shard":
        monkeypatch.setattr(disk, "save_file", fail)
    elif stage == "sync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(disk, "_put_in_place", fail)
    own = stage == "source"
    with pytest.raises(OSError if own else WeightUpdateError, match="No space left"):
        disk.write(path, source)
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == (["w"] if there_before else [])
    if there_before:
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    disk.write(path, named(3))
    assert dict(safetensors.tensors(path)).keys() == dict(named(3)).keys()


def test_a_folder_that_cannot_be_made_is_told_as_an_update_error(tiny, tmp_path) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    options = PushOptions(transport="disk", folder=taken)
    with make_replica(tiny[0]) as replica:
        with (
            Publisher(tiny_hf("qwen2", tie_word_embeddings=True), [replica], options) as publisher,
            pytest.raises(SlipstreamError, match="cannot write"),
        ):
            publisher.push(1)
        assert replica.state().open_update is None


def test_trainers_that_share_a_folder_publish_their_own_weights(tiny, tmp_path) -> None:
    """Another one publishes the same version to its own engine while this one's is loading."""
    mine, others = (tiny_hf("qwen2", seed=seed, tie_word_embeddings=True) for seed in (1, 2))
    options = PushOptions(transport="disk", folder=tmp_path)

    class Interrupted:
        def __init__(self, replica, other) -> None:
            self.replica, self.other = replica, other

        def send(self, command):
            if isinstance(command, LoadFromDisk):
                with Publisher(others, [self.other], options) as publisher:
                    publisher.push(1)
            return self.replica.send(command)

    with make_replica(tiny[0]) as one, make_replica(tiny[0]) as two:
        with Publisher(mine, [Interrupted(one, two)], options) as publisher:
            publisher.push(1)
        assert logprob_gap(one, mine, "mine") < 1e-4
        assert logprob_gap(two, others, "others") < 1e-4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["nowhere", "elsewhere"])
def test_a_link_in_the_place_of_a_folder_makes_way(tmp_path, target) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("stays")
    (tmp_path / "w").symlink_to(tmp_path / target)
    new = named(1)
    for _ in range(2):
        path = disk.write(tmp_path / "w", new)
        assert not path.is_symlink()
        assert dict(safetensors.tensors(path)).keys() == dict(new).keys()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["elsewhere", "w"]
    assert (tmp_path / "elsewhere" / "file").read_text() == "stays"
