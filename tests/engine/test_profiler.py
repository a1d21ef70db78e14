"""Profiles of a rank: one at a time, traces in files, errors that say what is wrong."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from engine.errors import InvalidRequest, ProfileOrder
from engine.profiler import RankProfiler
from engine.protocol import StartProfile, StopProfile
from tests.helpers.engines import drain, make_replica, request
from tests.helpers.tiny_models import write_tiny

CPU = torch.device("cpu")


def step(profiler: RankProfiler, number: int) -> None:
    profiler.before(number)
    torch.ones(8) @ torch.ones(8)
    profiler.after()


def dots(path: str) -> int:
    """Products of two vectors that a trace holds."""
    with gzip.open(path, "rt") as file:
        return sum(event.get("name") == "aten::dot" for event in json.load(file)["traceEvents"])


def test_what_runs_between_start_and_stop_is_in_the_trace(tmp_path: Path) -> None:
    profiler = RankProfiler(CPU, rank=3)
    step(profiler, 0)
    profiler.start(StartProfile(folder=str(tmp_path / "new" / "folder"), name="mine"))
    for number in (1, 2):
        step(profiler, number)
    path = profiler.stop()
    step(profiler, 3)
    assert Path(path) == tmp_path / "new" / "folder" / "mine-TP-3.trace.json.gz"
    assert dots(path) == 2


def test_counted_steps_end_it(tmp_path: Path) -> None:
    profiler = RankProfiler(CPU, rank=0)
    profiler.start(StartProfile(folder=str(tmp_path), start_step=2, num_steps=2))
    for number in range(6):
        step(profiler, number)
    assert dots(str(tmp_path / "profile-TP-0.trace.json.gz")) == 2
    with pytest.raises(ProfileOrder, match=r"ended by itself: .*profile-TP-0"):
        profiler.stop()
    profiler.start(StartProfile(folder=str(tmp_path), name="again"))
    assert Path(profiler.stop()).exists()


def test_out_of_order(tmp_path: Path) -> None:
    profiler = RankProfiler(CPU, rank=0)
    with pytest.raises(ProfileOrder, match="no profile is in progress"):
        profiler.stop()
    profiler.start(StartProfile(folder=str(tmp_path)))
    with pytest.raises(ProfileOrder, match="started already"):
        profiler.start(StartProfile(folder=str(tmp_path)))
    profiler.stop()
    profiler.start(StartProfile(folder=str(tmp_path), start_step=100))
    with pytest.raises(ProfileOrder, match="step 100 did not come"):
        profiler.stop()
    profiler.start(StartProfile(folder=str(tmp_path)))
    profiler.stop()


def test_what_cannot_be_done_is_refused_and_leaves_no_profile(tmp_path: Path) -> None:
    profiler = RankProfiler(CPU, rank=0)
    (tmp_path / "file").touch()
    with pytest.raises(InvalidRequest, match="cannot be made"):
        profiler.start(StartProfile(folder=str(tmp_path / "file" / "below")))
    with pytest.raises(InvalidRequest, match="no GPU"):
        profiler.start(StartProfile(folder=str(tmp_path), activities=["gpu"]))
    profiler.start(StartProfile(folder=str(tmp_path)))
    profiler.stop()


def test_a_trace_that_cannot_be_written_costs_no_step(tmp_path: Path) -> None:
    profiler = RankProfiler(CPU, rank=0)
    profiler.start(StartProfile(folder=str(tmp_path / "a"), num_steps=1))
    (tmp_path / "a").rmdir()
    step(profiler, 0)
    with pytest.raises(ProfileOrder, match="ended by itself: no trace was written"):
        profiler.stop()


def test_an_engine_profiles_its_steps(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model")
    replica = make_replica(tmp_path / "model")
    replica.send(StartProfile(folder=str(tmp_path / "traces"), record_shapes=True))
    replica.submit([request("a", [5, 6, 7], max_new_tokens=3)])
    drain(replica)
    (path,) = replica.send(StopProfile()).traces
    with gzip.open(path, "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    # At least one product of matrices a layer in each of the three steps.
    assert sum(name in ("aten::mm", "aten::addmm", "aten::linear") for name in names) >= 6
    with pytest.raises(ProfileOrder):
        replica.send(StopProfile())
    replica.close()


@pytest.mark.gpu
def test_kernels_are_in_the_trace_of_a_gpu(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model", dtype=torch.bfloat16)
    replica = make_replica(tmp_path / "model", device="cuda", dtype="bfloat16")
    replica.send(StartProfile(folder=str(tmp_path / "traces"), num_steps=4))
    replica.submit([request("a", [5, 6, 7], max_new_tokens=8)])
    drain(replica)
    with gzip.open(tmp_path / "traces" / "profile-TP-0.trace.json.gz", "rt") as file:
        kinds = {event.get("cat") for event in json.load(file)["traceEvents"]}
    assert {"kernel", "cpu_op"} <= kinds
    replica.close()
