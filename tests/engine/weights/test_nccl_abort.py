"""Communicators that fail while they form, and aborts that hang, over a library that is a fake."""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Any

import pytest
import torch

from engine.comm import nccl
from engine.comm.nccl import UNIQUE_ID_BYTES, Communicator, NcclError
from engine.parallel.mesh import Mesh
from engine.protocol.deadlines import MEET_S
from engine.weights.groups import Groups
from tests.helpers.peers import until

_IN_PROGRESS, _FAILED = 7, 2


class FakeLibrary:
    """As much of NCCL as a communicator calls. state: what it says of the set-up."""

    def __init__(self, state: int) -> None:
        self.state = state
        self.aborted: list[int] = []
        self.release = threading.Event()
        self.release.set()

    def ncclCommInitRankConfig(self, comm: Any, *_rest: Any) -> int:
        ctypes.cast(comm, ctypes.POINTER(ctypes.c_void_p))[0] = ctypes.c_void_p(1234)
        return _IN_PROGRESS

    def ncclCommGetAsyncError(self, _comm: Any, state: Any) -> int:
        ctypes.cast(state, ctypes.POINTER(ctypes.c_int))[0] = self.state
        return 0

    def ncclCommAbort(self, comm: Any) -> int:
        self.release.wait(MEET_S)
        self.aborted.append(comm.value)
        return 0

    def ncclGetErrorString(self, _result: int) -> bytes:
        return b"unhandled system error"

    def ncclGetLastError(self, _comm: Any) -> bytes:
        return b""


def form(deadline_s: float, **given: Any) -> Communicator:
    return Communicator(
        bytes(UNIQUE_ID_BYTES),
        rank=1,
        world_size=2,
        deadline=time.monotonic() + deadline_s,
        **given,
    )


@pytest.mark.parametrize(
    ("state", "deadline_s", "error"),
    [(_FAILED, MEET_S, NcclError), (_IN_PROGRESS, 0.02, TimeoutError)],
)
def test_a_communicator_that_does_not_form_is_aborted(
    state: int, deadline_s: float, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = FakeLibrary(state)
    monkeypatch.setattr(nccl, "library", lambda: library)
    with pytest.raises(error):
        form(deadline_s)
    assert library.aborted == [1234]


def test_a_communicator_that_is_given_up_while_it_forms_is_aborted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = FakeLibrary(_IN_PROGRESS)
    monkeypatch.setattr(nccl, "library", lambda: library)

    def look() -> None:
        raise KeyError("given up")

    with pytest.raises(KeyError):
        form(MEET_S, look=look)
    assert library.aborted == [1234]


class Dropped:
    """A group over a communicator whose abort hangs."""

    name = "g"

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm

    def abort(self) -> bool:
        self._comm.abort()
        return self._comm.is_freed


def test_memory_is_kept_until_a_hung_abort_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeLibrary(0)
    monkeypatch.setattr(nccl, "library", lambda: library)
    monkeypatch.setattr(nccl, "ABORT_S", 0.05)
    groups = Groups(torch.device("cpu"), Mesh())
    comm = form(MEET_S)
    library.release.clear()
    memory = [torch.zeros(1000)]
    groups._open["g"] = (None, Dropped(comm))  # type: ignore[assignment]
    groups.lend("g", memory)
    groups.leave("g")
    assert groups.names == [] and groups.num_parked == 1
    assert groups._parked[0].memory is memory
    library.release.set()
    until(lambda: groups.num_parked == 0)
    assert library.aborted == [1234]


class Slow:
    """A group whose back end takes its time to be freed."""

    name = "g"

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.was_told: list[bool] = []

    def abort(self) -> bool:
        self.was_told.append(self.may_end.wait(30))
        return True


def test_a_trainer_that_leaves_does_not_wait_for_the_back_end() -> None:
    groups = Groups(torch.device("cpu"), Mesh())
    group = Slow()
    groups._open["g"] = (None, group)  # type: ignore[assignment]
    groups.drop("g")
    assert groups.names == [] and groups.num_parked == 1
    group.may_end.set()
    until(lambda: groups.num_parked == 0)
    assert all(group.was_told)
