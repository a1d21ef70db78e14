"""A server behind a router as a replica: outputs as of a replica here, losses told once."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from engine.errors import EngineDead, InvalidRequest, UnsupportedOption
from engine.protocol import BeginUpdate, FlushCache
from rollout.offline import generate
from rollout.replica.remote.http_replica import HttpReplica
from tests.helpers.engines import request
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.live_fleet import LiveFleet, live_fleet

NUM_TOKENS = 5


@pytest.fixture(scope="module")
def fleet():
    with live_fleet(2) as found:
        yield found


def asked(count: int):
    return [
        request(f"r{place}", [1, place], seed=place, max_new_tokens=NUM_TOKENS)
        for place in range(count)
    ]


def test_requests_run_there_as_they_do_here(fleet: LiveFleet) -> None:
    with HttpReplica(fleet.url) as replica:
        outputs = generate(replica, asked(20))
        assert [o.token_ids.tolist() for o in outputs] == [
            expected_tokens([1, place], NUM_TOKENS) for place in range(20)
        ]
        assert replica.idle() and replica.step() == []
        assert replica.send(FlushCache()).error is None
        with pytest.raises(UnsupportedOption, match="over a group"):
            replica.update_weights_inproc(BeginUpdate(version=1, manifest=[]), [])


def test_a_refused_request_touches_no_other(fleet: LiveFleet) -> None:
    good, bad, worse = asked(3)
    bad = replace(bad, prompt_ids=bad.prompt_ids.repeat(100_000))
    worse = replace(worse, top_logprobs=2)
    with HttpReplica(fleet.url) as replica:
        found = {output.rid: output for output in generate(replica, [good, bad, worse])}
    assert found["r0"].token_ids.tolist() == expected_tokens([1, 0], NUM_TOKENS)
    errors = [found[rid].finish.error for rid in ("r1", "r2")]
    assert errors == ["ContextTooLong", "UnsupportedOption"]


def test_a_server_that_goes_is_told_once_what_was_open_has_ended() -> None:
    with live_fleet(1) as fleet:
        replica = HttpReplica(fleet.url)
        replica.submit(asked(1))
        while not (outputs := replica.step()):
            pass
        assert outputs[0].token_ids.tolist() == expected_tokens([1, 0], NUM_TOKENS)
    replica.submit(asked(3))
    with replica, pytest.raises(EngineDead, match=f"^{fleet.url}: no answer"):
        while not replica.idle():
            assert replica.step() == []
    assert replica.idle()


def test_what_is_no_url_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="is no URL of a server"):
        HttpReplica("localhost:30000")
