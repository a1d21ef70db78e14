"""The same behaviour of both replicas, and what only one of them can do."""

import dataclasses
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from engine.errors import (
    EngineDead,
    InvalidRequest,
    ManifestMismatch,
    ModelNotFound,
    SlipstreamError,
    UnsupportedOption,
    UpdateOrder,
)
from engine.protocol import (
    Abort,
    BeginUpdate,
    CommitUpdate,
    FlushCache,
    LoadFromDisk,
    Pause,
    Request,
    RequestOutput,
    Resume,
    SetVersion,
)
from engine.protocol.deadlines import RES_OPTIONS
from rollout.replica.base import Replica
from rollout.replica.inline import InlineReplica
from rollout.replica.spawned import ProcessReplica
from tests.helpers.fake_executor import POISON, FakeExecutor, expected_tokens
from tests.helpers.replicas import fake_config, inline, make_request, overlapped, spawned

pytestmark = pytest.mark.slow

Make = Callable[..., Replica]


@pytest.fixture(params=[inline, overlapped, spawned], ids=["inline", "overlapped", "spawned"])
def replica(request: pytest.FixtureRequest) -> Iterator[Replica]:
    make: Make = request.param
    with make() as made:
        yield made


def drain(replica: Replica) -> dict[str, RequestOutput]:
    """Step until idle; the final outputs by request."""
    final: dict[str, RequestOutput] = {}
    deadline = time.monotonic() + 60
    while not replica.idle():
        assert time.monotonic() < deadline, "the replica does not become idle"
        final |= {o.rid: o for o in replica.step() if o.finish is not None}
    return final


def many(count: int, **sampling: object) -> list[Request]:
    return [make_request(f"r{i}", [i + 1, 2, 3, i], **sampling) for i in range(count)]


def test_requests_run_to_their_length(replica: Replica) -> None:
    requests = many(40)
    replica.submit(requests)
    final = drain(replica)
    for request in requests:
        output = final[request.rid]
        assert output.token_ids.tolist() == expected_tokens(request.prompt_ids.tolist(), 8)
        assert output.finish is not None
        assert output.finish.type == "length"
        assert len(output.logprobs) == 8
    state = replica.state()
    assert (state.num_running, state.num_waiting, state.num_output_tokens) == (0, 0, 320)


def test_masked_requests_get_what_is_allowed(replica: Replica) -> None:
    masked = [
        replace(request, rid=f"m{i}", allowed_token_ids=np.array([5, 40 + i], np.int32))
        for i, request in enumerate(many(6))
    ]
    replica.submit([*many(6), *masked])
    final = drain(replica)
    for i, request in enumerate(many(6)):
        prompt = request.prompt_ids.tolist()
        assert final[f"r{i}"].token_ids.tolist() == expected_tokens(prompt, 8)
        want = expected_tokens(prompt, 8, allowed=[5, 40 + i])
        assert final[f"m{i}"].token_ids.tolist() == want


def test_a_refused_request_comes_back_and_touches_no_other(replica: Replica) -> None:
    bad = [make_request("cold", [1], temperature=-1.0), make_request("empty", [])]
    bad += [make_request("high", [4000]), make_request("r0", [1])]
    replica.submit([*many(1), *bad])
    finals = [o for o in collect(replica) if o.finish is not None]
    errors = {(o.rid, o.finish.error) for o in finals if o.finish and o.finish.error}
    assert errors == {(rid, "InvalidRequest") for rid in ("cold", "empty", "high", "r0")}
    assert [o.rid for o in finals if o.finish and o.finish.type == "length"] == ["r0"]


def collect(replica: Replica) -> list[RequestOutput]:
    """Every output until each of the five submitted above has ended."""
    found: list[RequestOutput] = []
    deadline = time.monotonic() + 60
    while sum(o.finish is not None for o in found) < 5 and time.monotonic() < deadline:
        found += replica.step()
    return found


def test_abort_returns_what_there_is(replica: Replica) -> None:
    replica.submit([make_request("long", [1, 2], max_new_tokens=100), *many(1)])
    replica.send(Pause())
    replica.send(Abort(rid_prefix="long"))
    replica.send(Resume())
    final = drain(replica)
    finish = final["long"].finish
    assert finish is not None
    assert (finish.type, finish.error) == ("abort", None)
    count = len(final["long"].token_ids)
    assert final["long"].token_ids.tolist() == expected_tokens([1, 2], count)
    assert len(final["r0"].token_ids) == 8


def test_pause_keeps_and_resume_goes_on(replica: Replica) -> None:
    replica.send(Pause())
    replica.submit(many(3))
    for _ in range(3):
        assert replica.step() == []
    assert replica.state().paused
    replica.send(Resume())
    assert len(drain(replica)) == 3


def test_typed_errors_cross_unchanged(replica: Replica) -> None:
    with pytest.raises(UpdateOrder, match="no update is open") as caught:
        replica.send(CommitUpdate(version=1))
    assert caught.value.field == "version"
    replica.send(Pause())
    replica.send(Resume())


def test_update_from_disk_is_seen_by_the_next_token(replica: Replica) -> None:
    replica.submit(many(1))
    before = drain(replica)["r0"]
    replica.send(BeginUpdate(version=3))
    replica.send(LoadFromDisk(path="5"))
    report = replica.send(CommitUpdate(version=3)).report
    assert report is not None
    assert report.version == 3
    assert replica.state().version == 3
    replica.submit(many(1))
    after = drain(replica)["r0"]
    assert before.spans[0].version == 0
    assert after.spans[0].version == 3
    assert after.token_ids.tolist() == expected_tokens([1, 2, 3, 0], 8, shift=5)


def test_a_failed_step_ends_its_requests_and_the_engine_goes_on(replica: Replica) -> None:
    replica.submit([make_request("bad", [POISON, 1])])
    finish = drain(replica)["bad"].finish
    assert finish is not None
    assert (finish.type, finish.error) == ("abort", "OutOfMemory")
    replica.submit(many(2))
    assert all(len(o.token_ids) == 8 for o in drain(replica).values())


def test_flush_is_refused_while_pages_are_held(replica: Replica) -> None:
    replica.submit([make_request("long", [1, 2], max_new_tokens=400, ignore_eos=True)])
    replica.send(Pause())
    if replica.state().num_running:
        with pytest.raises(SlipstreamError):
            replica.send(FlushCache())
    replica.send(Abort(all=True))
    replica.send(Resume())
    drain(replica)
    replica.send(FlushCache())
    assert replica.state().cached_pages == 0


def test_close_twice(replica: Replica) -> None:
    replica.close()
    replica.close()


def test_inline_update_in_process() -> None:
    with inline() as replica:
        report = replica.update_weights_inproc(BeginUpdate(version=2), [("shift", 9)])
        assert report.version == 2
        replica.submit(many(1))
        tokens = drain(replica)["r0"].token_ids.tolist()
        assert tokens == expected_tokens([1, 2, 3, 0], 8, shift=9)


def test_inline_update_that_fails_is_aborted_and_the_old_version_serves() -> None:
    def broken() -> Iterator[tuple[str, int]]:
        yield "shift", 4
        raise RuntimeError("the trainer's iterator broke")

    with inline() as replica:
        with pytest.raises(ManifestMismatch):
            replica.update_weights_inproc(BeginUpdate(version=1), [("strange", 1)])
        with pytest.raises(RuntimeError, match="iterator broke"):
            replica.update_weights_inproc(BeginUpdate(version=1), broken())
        assert replica.state().version == 0
        replica.submit(many(1))
        assert drain(replica)["r0"].token_ids.tolist() == expected_tokens([1, 2, 3, 0], 8)
        replica.update_weights_inproc(BeginUpdate(version=1), [("shift", 1)])
        assert replica.state().version == 1


def test_inline_update_while_a_request_runs_shows_both_versions() -> None:
    with inline() as replica:
        replica.submit(many(1))
        for _ in range(3):
            replica.step()
        replica.update_weights_inproc(BeginUpdate(version=1), [("shift", 1)])
        spans = drain(replica)["r0"].spans
        assert [(s.version, s.start, s.end) for s in spans] == [(0, 0, 3), (1, 3, 8)]


def test_closing_the_inline_replica_closes_the_executor() -> None:
    replica = inline()
    replica.close()
    assert replica._leader._executor.closed


def test_spawned_refuses_tensors_of_this_process() -> None:
    with spawned() as replica, pytest.raises(UnsupportedOption, match="LoadFromDisk") as caught:
        replica.update_weights_inproc(BeginUpdate(version=1), [])
    assert caught.value.field == "transport"


def test_a_model_that_is_missing_is_typed_also_when_spawned() -> None:
    with pytest.raises(ModelNotFound) as caught:
        spawned("missing")
    assert caught.value.field == "model"


@pytest.mark.parametrize("own", [None, "timeout:3"])
def test_a_spawned_leader_asks_the_resolver_again_soon(
    own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RES_OPTIONS", raising=False)
    if own is not None:
        monkeypatch.setenv("RES_OPTIONS", own)
    with spawned() as replica:
        environment = Path(f"/proc/{replica._process.pid}/environ").read_bytes().split(b"\0")
    assert f"RES_OPTIONS={own or RES_OPTIONS}".encode() in environment


def test_a_leader_that_leaves_while_loading() -> None:
    with pytest.raises(EngineDead, match="exited with code 3"):
        spawned("exit")


def test_a_leader_that_leaves_in_a_step_keeps_raising() -> None:
    with spawned("die") as replica:
        replica.submit(many(1))
        with pytest.raises(EngineDead, match="exited with code 5"):
            drain(replica)
        with pytest.raises(EngineDead, match="exited with code 5"):
            replica.state()


def test_a_killed_leader_is_named_with_its_signal() -> None:
    with spawned() as replica:
        os.kill(replica._process.pid, signal.SIGKILL)
        with pytest.raises(EngineDead, match="killed by signal 9"):
            replica.state()


def test_a_leader_that_hangs_misses_its_deadline_and_is_killed() -> None:
    with spawned("hang", reply_s=1.0) as replica:
        replica.submit(many(1))
        with pytest.raises(EngineDead, match="did not answer 'get_state'"):
            drain(replica)
        assert replica._process.poll() is not None


def test_the_dead_leaders_log_is_in_the_error() -> None:
    with pytest.raises(EngineDead, match=r"No module named 'tests\.helpers\.absent'"):
        ProcessReplica(fake_config(), factory="tests.helpers.absent:build", start_s=60.0)


def test_a_message_that_cannot_be_encoded_leaves_no_trace() -> None:
    with spawned() as replica:
        wide = replace(many(1)[0], seed=1 << 64)
        replica.submit([wide])
        (refusal,) = replica.step()
        assert refusal.finish is not None
        assert (refusal.finish.error, "seed" in (refusal.finish.message or "")) == (
            "InvalidRequest",
            True,
        )
        assert replica.idle()
        with pytest.raises(InvalidRequest, match="version"):
            replica.send(SetVersion(version=1 << 64))
        assert replica.state().version == 0
        replica.submit(many(2))
        assert len(drain(replica)) == 2


def test_an_engine_without_a_version_takes_no_request() -> None:
    config = dataclasses.replace(fake_config(), weight_version=4, refusal="publish version 4")
    with InlineReplica(config, FakeExecutor(config)) as replica:
        replica.submit(many(1))
        (output,) = replica.step()
        assert output.finish is not None
        assert (output.finish.error, output.finish.message) == ("NoVersion", "publish version 4")
        assert replica.state().refusal == "publish version 4"
        replica.send(BeginUpdate(version=5, partial=True))
        replica.send(CommitUpdate(version=5))
        assert replica.state().refusal, "a part of a version is no version"
        replica.send(BeginUpdate(version=6))
        replica.send(CommitUpdate(version=6))
        assert replica.state().refusal == ""
        replica.submit(many(1))
        assert len(drain(replica)) == 1


def test_closing_leaves_no_process_and_no_files() -> None:
    replica = spawned()
    replica.close()
    assert replica._process.poll() == 0
    assert not replica._folder.exists()
    with pytest.raises(EngineDead, match="closed"):
        replica.state()


def test_an_inline_replica_is_a_replica() -> None:
    def takes(replica: Replica) -> Replica:
        return replica

    assert isinstance(takes(inline()), InlineReplica)


def test_a_machine_without_temporary_files_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(InvalidRequest, match="no temporary files can be written") as caught:
        ProcessReplica(fake_config())
    assert caught.value.field == "TMPDIR"
