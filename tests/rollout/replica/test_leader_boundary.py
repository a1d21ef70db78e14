"""The last boundary: what goes wrong with one request, command or step ends that and no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from engine.errors import EngineDead, InternalError, InvalidRequest, OutOfMemory
from engine.protocol import (
    Abort,
    BeginUpdate,
    GetState,
    LoadFromDisk,
    Request,
    RequestOutput,
    SetVersion,
    Stop,
)
from rollout.ranks.device_errors import breaks_device
from rollout.replica.inline import InlineReplica
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.replicas import inline, make_request, overlapped

LONG = {"max_new_tokens": 40}


def drain(replica: InlineReplica) -> dict[str, RequestOutput]:
    final: dict[str, RequestOutput] = {}
    for _ in range(1000):
        if replica.idle():
            return final
        final |= {o.rid: o for o in replica.step() if o.finish is not None}
    raise AssertionError("the replica does not become idle")


def serves(replica: InlineReplica) -> bool:
    """Whether a new request runs to its end with the right tokens, and nothing is lost."""
    replica.submit([make_request("after", [5, 6])])
    tokens = drain(replica)["after"].token_ids.tolist()
    state = replica.state()
    whole = state.free_pages + state.cached_pages == state.total_pages
    return whole and tokens == expected_tokens([5, 6], 8)


def raising(error: Exception, times: int = 1) -> Callable[..., Any]:
    """A stand-in that raises `error` some times and then does what it stands in for."""
    left = [times]

    def wrap(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if left[0] > 0:
                left[0] -= 1
                raise error
            return run(*args, **kwargs)

        return call

    return wrap


HUGE: list[tuple[str, Request]] = [
    ("priority", make_request("bad", [1])),
    ("priority", replace(make_request("bad", [1]), priority=-(2**63) - 1)),
    ("top_k", make_request("bad", [1], top_k=2**63)),
    ("min_new_tokens", make_request("bad", [1], min_new_tokens=2**31, max_new_tokens=2**31 - 1)),
    ("seed", replace(make_request("bad", [1]), seed=2**70)),
    ("temperature", make_request("bad", [1], temperature=1e300)),
    ("repetition_penalty", make_request("bad", [1], repetition_penalty=1e39)),
    ("frequency_penalty", make_request("bad", [1], frequency_penalty=-1e39)),
    ("logit_bias", make_request("bad", [1], logit_bias={3: -1e39})),
    ("prompt_logprob_start", replace(make_request("bad", [1]), prompt_logprob_start=2**40)),
]
HUGE[0] = ("priority", replace(HUGE[0][1], priority=2**63))


@pytest.mark.parametrize(("field", "request_"), HUGE)
@pytest.mark.parametrize("make", [inline, overlapped])
def test_a_number_that_nothing_stores_ends_its_request_alone(
    field: str, request_: Request, make: Callable[[], InlineReplica]
) -> None:
    with make() as replica:
        replica.submit([make_request("good", [1, 2], **LONG)])
        replica.step()
        replica.submit([request_])
        final = drain(replica)
        finish = final["bad"].finish
        assert finish is not None
        assert (finish.type, finish.error) == ("abort", "InvalidRequest")
        assert field in (finish.message or "")
        assert final["good"].token_ids.tolist() == expected_tokens([1, 2], 40)
        assert serves(replica)


def test_a_request_that_breaks_the_scheduler_ends_alone() -> None:
    with inline() as replica:
        broken = replace(make_request("bad", [1]), stop_ids=["x"], group="g")
        replica.submit([make_request("good", [1, 2]), broken])
        final = drain(replica)
        finish = final["bad"].finish
        assert finish is not None
        assert (finish.type, finish.error) == ("abort", "InvalidRequest")
        assert len(final["good"].token_ids) == 8
        assert serves(replica)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(5, "input/output"), InvalidRequest),
        (ValueError("embedded null byte"), InvalidRequest),
        (TypeError("no"), InvalidRequest),
        (OverflowError("int too big"), InvalidRequest),
        (AssertionError("ours"), InternalError),
        (KeyError("k"), InternalError),
        (OutOfMemory("typed"), OutOfMemory),
    ],
)
def test_a_command_that_breaks_is_a_typed_reply_naming_it(
    error: Exception, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    with inline() as replica:
        replica.submit([make_request("good", [1, 2], **LONG)])
        replica.step()
        executor = replica._leader._executor
        monkeypatch.setattr(executor, "handle", raising(error)(executor.handle))
        with pytest.raises(kind) as caught:
            replica.send(BeginUpdate(version=1))
        if not isinstance(error, OutOfMemory):
            assert "begin_update" in str(caught.value)
            assert caught.value.field == "begin_update"
        assert drain(replica)["good"].token_ids.tolist() == expected_tokens([1, 2], 40)
        assert serves(replica)


def test_a_version_no_table_holds_is_refused() -> None:
    with inline() as replica:
        replica.submit([make_request("good", [1, 2], **LONG)])
        replica.step()
        with pytest.raises(InvalidRequest, match="version"):
            replica.send(SetVersion(version=2**63))
        with pytest.raises(InvalidRequest, match="version"):
            replica.send(BeginUpdate(version=2**63))
        assert drain(replica)["good"].token_ids.tolist() == expected_tokens([1, 2], 40)


PLACES = [
    ("_scheduler.plan", inline),
    ("_scheduler.plan", overlapped),
    ("_scheduler.apply", inline),
    ("_scheduler.apply", overlapped),
    ("_executor.execute", inline),
    ("_executor.launch", overlapped),
]


@pytest.mark.parametrize(("place", "make"), PLACES)
def test_a_step_that_breaks_ends_what_runs_and_the_engine_goes_on(
    place: str, make: Callable[[], InlineReplica], monkeypatch: pytest.MonkeyPatch
) -> None:
    with make() as replica:
        replica.submit([make_request(f"r{i}", [i + 1, 2, 3], **LONG) for i in range(5)])
        for _ in range(3):
            replica.step()
        owner, name = place.split(".")
        target = getattr(replica._leader, owner)
        monkeypatch.setattr(target, name, raising(ZeroDivisionError("ours"))(getattr(target, name)))
        for output in drain(replica).values():
            assert output.finish is not None
            assert output.finish.error == "InternalError"
            assert "ZeroDivisionError" in (output.finish.message or "")
            count = len(output.token_ids)
            prompt = [int(output.rid[1:]) + 1, 2, 3]
            assert output.token_ids.tolist() == expected_tokens(prompt, count)
        assert serves(replica)


def test_a_plan_that_breaks_half_way_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with overlapped() as replica:
        replica.submit([make_request(f"r{i}", [i + 1, 2, 3], **LONG) for i in range(5)])
        replica.step()
        table = replica._leader._scheduler._running.table
        replica.submit([make_request(f"q{i}", [i + 1, 4, 3], **LONG) for i in range(5)])
        # The slot was taken and its prefix held when this fails.
        monkeypatch.setattr(table, "load", raising(OverflowError("no word"))(table.load))
        final = drain(replica)
        assert len(final) == 10
        assert {o.finish.error for o in final.values() if o.finish} == {"InternalError"}
        assert serves(replica)


def test_an_engine_that_only_fails_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with inline() as replica:
        executor = replica._leader._executor
        stand_in = raising(ZeroDivisionError("ours"), times=10)(executor.execute)
        monkeypatch.setattr(executor, "execute", stand_in)
        for _ in range(2):
            replica.submit([make_request("r", [1])])
            assert replica.step()[0].finish is not None
        replica.submit([make_request("r", [1])])
        with pytest.raises(EngineDead, match="3 in a row"):
            replica.step()


def test_a_broken_device_ends_the_engine_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with inline() as replica:
        executor = replica._leader._executor
        error = RuntimeError("CUDA error: an illegal memory access was encountered")
        monkeypatch.setattr(executor, "execute", raising(error)(executor.execute))
        replica.submit([make_request("r", [1])])
        with pytest.raises(EngineDead, match="illegal memory access"):
            replica.step()


def test_which_errors_break_a_device() -> None:
    class AcceleratorError(RuntimeError):
        pass

    class OutOfMemoryError(RuntimeError):
        pass

    assert breaks_device(AcceleratorError("anything"))
    assert breaks_device(RuntimeError("CUDA error: device-side assert triggered"))
    assert not breaks_device(OutOfMemoryError("CUDA out of memory"))
    assert not breaks_device(RuntimeError("shapes do not match"))


@pytest.mark.parametrize(
    "command", [Abort(rid="r1"), Stop(rid="r1", num_tokens=2, matched="x"), GetState()]
)
def test_ending_one_request_leaves_steps_in_flight(command: Any) -> None:
    with overlapped() as replica, inline() as alone:
        for each in (replica, alone):
            each.submit([make_request(f"r{i}", [i + 1, 2, 3], **LONG) for i in range(5)])
            for _ in range(6):
                each.step()
        in_flight = list(replica._leader._in_flight)
        assert in_flight
        replica.send(command)
        alone.send(command)
        assert list(replica._leader._in_flight) == in_flight
        final, plain = drain(replica), drain(alone)
        assert final.keys() == plain.keys()
        for rid, output in plain.items():
            if rid != "r1" or isinstance(command, Stop):
                assert np.array_equal(output.token_ids, final[rid].token_ids), rid
                assert output.finish == final[rid].finish
        assert serves(replica)


def test_a_slot_that_was_stopped_and_taken_again_gets_no_token_of_the_other() -> None:
    with overlapped() as replica:
        replica.submit([make_request(f"r{i}", [i + 1, 2, 3], **LONG) for i in range(32)])
        for _ in range(4):
            replica.step()
        for i in range(16):
            replica.send(Abort(rid=f"r{i}"))
        replica.submit([make_request(f"q{i}", [i + 1, 9], **LONG) for i in range(16)])
        final = drain(replica)
        for i in range(16):
            assert final[f"q{i}"].token_ids.tolist() == expected_tokens([i + 1, 9], 40)


def test_integrity_is_walked_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with inline() as replica:
        walks: list[int] = []
        scheduler = replica._leader._scheduler
        monkeypatch.setattr(scheduler, "check_integrity", lambda: walks.append(1))
        replica.submit([make_request("a", [1])])
        drain(replica)
        assert walks
        walks.clear()
        monkeypatch.setattr(replica._leader, "_checks_integrity", False)
        replica.submit([make_request("a", [1])])
        drain(replica)
        assert not walks


@pytest.mark.parametrize("mode", ["in_place", "undo"])
def test_a_transfer_that_breaks_in_place_is_aborted_so_that_nobody_waits(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with inline() as replica:
        executor = replica._leader._executor
        handled: list[str] = []
        handle = executor.handle

        def broken(command: Any) -> Any:
            handled.append(type(command).__name__)
            if isinstance(command, LoadFromDisk):
                raise OSError("it went away")
            reply = handle(command)
            if isinstance(command, BeginUpdate):
                return replace(reply, in_place=True, undo=mode == "undo")
            return reply

        monkeypatch.setattr(executor, "handle", broken)
        replica.submit([make_request("r", [1, 2])])
        replica.send(BeginUpdate(version=1))
        assert replica.step() == []
        with pytest.raises(InvalidRequest, match="went away"):
            replica.send(LoadFromDisk(path="x"))
        assert handled[-1] == "AbortUpdate"
        assert replica.state().open_update is None
        assert len(drain(replica)["r"].token_ids) == 8
        with pytest.raises(InvalidRequest):
            executor.handle = handle
            replica.send(SetVersion(version=-1))
