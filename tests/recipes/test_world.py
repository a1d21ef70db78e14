"""Shares of the processes of a run; one process alone needs no group."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from engine.errors import InvalidRequest
from recipes.world import World, open_world
from tests.helpers.children import ROOT, child_environment

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("num", [0, 1, 7, 8])
def test_shares_cover_everything_once_and_differ_by_one_at_most(size: int, num: int) -> None:
    shares = [World(rank=r, size=size, rollout_ranks=size).share(num) for r in range(size)]
    assert [index for share in shares for index in share] == list(range(num))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_with_engines_elsewhere_the_first_rolls_out_everything() -> None:
    shares = [World(rank=rank, size=3, rollout_ranks=1).share(4) for rank in range(3)]
    assert [list(share) for share in shares] == [[0, 1, 2, 3], [], []]


def test_one_process_talks_to_itself() -> None:
    world = open_world(device="cpu", needs_group=False, colocated=True)
    assert (world.gather([1, 2]), world.from_main("x"), world.is_main) == ([1, 2], "x", True)
    assert not dist.is_initialized()
    world.close()


def test_a_group_of_one_is_made_and_left() -> None:
    world = open_world(device="cpu", needs_group=True, colocated=True)
    try:
        assert dist.get_world_size() == 1
    finally:
        world.close()
    assert not dist.is_initialized()


def test_a_rank_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InvalidRequest, match="there are 2; lower --nproc-per-node"):
        open_world(device="cuda", needs_group=False, colocated=True)


LEAVING = """
import atexit, sys
from recipes.world import leave

atexit.register(lambda: sys.stdout.write("handlers ran "))

class Kept:
    def __del__(self):
        sys.stdout.write("torn down")

kept = Kept()
sys.stdout.write("buffered ")
leave(3)
"""


@pytest.mark.parametrize("launched,said", [(True, ""), (False, "torn down")])
def test_a_launched_process_leaves_without_a_teardown(launched: bool, said: str) -> None:
    environment = child_environment()
    environment.pop("RANK", None)
    if launched:
        environment["RANK"] = "0"
    done = subprocess.run(
        [sys.executable, "-c", LEAVING],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == f"buffered handlers ran {said}"
