"""The calls made of an NCCL group, on a stand-in: no GPU is needed for their order."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from typing import Any

import pytest
import torch

from engine.errors import EngineDead
from engine.parallel import nccl
from engine.parallel.nccl import NcclCollectives
from engine.protocol.deadlines import LAUNCH_S
from tests.helpers.children import ROOT, child_environment

pytestmark = pytest.mark.slow


class StandIn:
    """Two ranks that hold the same; like torch, no handle for what is on the caller's stream."""

    def __init__(self) -> None:
        self.num_aborts = 0
        self.on_callers_stream: list[bool] = []

    def size(self) -> int:
        return 2

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> None:
        self.on_callers_stream.append(not options.asyncOp)
        tensors[0].mul_(2)

    def _allgather_base(self, out: torch.Tensor, x: torch.Tensor, options: Any) -> None:
        self.on_callers_stream.append(not options.asyncOp)
        assert x.is_contiguous()
        out.copy_(torch.stack([x, x]))

    def _reduce_scatter_base(self, out: torch.Tensor, x: torch.Tensor, options: Any) -> None:
        self.on_callers_stream.append(not options.asyncOp)
        assert x.is_contiguous()
        out.copy_(2 * x[: len(out)])

    def abort(self) -> None:
        self.num_aborts += 1


class Host:
    """What the NCCL group asks of the gloo group beside it."""

    closed = False

    def minimum(self, value: int) -> int:
        return value - 1

    def close(self) -> None:
        self.closed = True


def test_sums_in_place_on_the_callers_stream() -> None:
    group = StandIn()
    collectives = NcclCollectives(group, Host())
    x = torch.ones(2, 3)
    assert collectives.all_reduce(x) is x
    assert torch.equal(x, torch.full((2, 3), 2.0))
    assert group.on_callers_stream == [True]
    assert collectives.minimum(5) == 4


def test_gathers_pieces_of_different_widths() -> None:
    group = StandIn()
    gathered = NcclCollectives(group, Host()).all_gather_last(torch.arange(6.0).view(2, 3), [3, 2])
    assert gathered.tolist() == [[0, 1, 2, 0, 1], [3, 4, 5, 3, 4]]
    assert group.on_callers_stream == [True]


def test_gathers_rows_and_scatters_sums() -> None:
    group = StandIn()
    collectives = NcclCollectives(group, Host())
    x = torch.arange(8.0).view(4, 2)
    assert torch.equal(collectives.all_gather_rows(x), torch.cat([x, x]))
    assert torch.equal(collectives.reduce_scatter_rows(x), 2 * x[:2])
    assert group.on_callers_stream == [True, True]


def test_a_group_that_was_given_up_is_broken_once_and_not_used_again() -> None:
    group, host = StandIn(), Host()
    collectives = NcclCollectives(group, host)
    collectives.abort()
    collectives.close()
    assert group.num_aborts == 1
    assert host.closed
    with pytest.raises(EngineDead, match="given up"):
        collectives.all_reduce(torch.ones(1))


class Stuck(StandIn):
    """As NCCL is while captured graphs hold it: an abort ends when they are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs_dropped = threading.Event()
        self.ended = threading.Event()

    def abort(self) -> None:
        super().abort()
        assert self.graphs_dropped.wait(LAUNCH_S)
        self.ended.set()


def test_closing_waits_for_an_abort_that_had_to_be_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "_ABORT_S", 0.05)
    group, host = Stuck(), Host()
    collectives = NcclCollectives(group, host)
    collectives.abort()
    assert not group.ended.is_set()
    monkeypatch.setattr(nccl, "_ABORT_S", LAUNCH_S)
    threading.Timer(0.1, group.graphs_dropped.set).start()
    collectives.close()
    assert group.ended.is_set()
    assert (group.num_aborts, host.closed) == (1, True)


def test_a_group_that_was_given_up_is_never_destructed() -> None:
    group = StandIn()
    seen = weakref.ref(group)
    NcclCollectives(group, Host()).abort()
    del group
    gc.collect()
    assert seen() is not None


AT_EXIT = """
import threading, time
from tests.engine.parallel.test_nccl_collectives import LAUNCH_S, Host, StandIn, nccl

leaving = threading.Event()

class Late(StandIn):
    def abort(self):
        leaving.wait(LAUNCH_S)
        time.sleep(0.5)
        print("back", flush=True)

    def __del__(self):
        print("destructed", flush=True)

collectives = nccl.NcclCollectives(Late(), Host())
nccl._ABORT_S = LAUNCH_S
given_up = threading.Thread(target=collectives.abort, daemon=True)
given_up.start()
while collectives._breaking is None:
    time.sleep(0.001)
print("leaving", flush=True)
leaving.set()
"""


def test_the_interpreter_waits_for_an_abort_before_it_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT],
        cwd=ROOT,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=LAUNCH_S,
    )
    assert (done.returncode, done.stdout) == (0, "leaving\nback\n"), done.stderr
