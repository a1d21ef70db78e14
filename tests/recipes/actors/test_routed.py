"""Engines behind a router: who takes weights, who is behind, and who is waited for."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from engine.errors import EngineDead, FleetDivided, ManifestMismatch, SlipstreamError, UpdateOrder
from engine.protocol import GetState, RequestOutput, SetVersion
from recipes.actors.routed import RoutedEngines
from rollout.replica.remote.http_replica import HttpReplica
from tests.helpers.engines import request
from tests.helpers.live_fleet import LiveFleet, live_fleet
from tests.helpers.live_servers import live
from trainer_bridge.http_target import HttpTarget


def engines_of(fleet: LiveFleet, patience_s: float = 20.0) -> RoutedEngines:
    return RoutedEngines(HttpReplica(fleet.url), admin_key="", patience_s=patience_s)


@pytest.fixture
def fleet() -> Iterator[tuple[LiveFleet, RoutedEngines]]:
    with live_fleet(2) as found:
        engines = engines_of(found)
        yield found, engines
        engines.close()


def in_rotation(fleet: LiveFleet) -> set[str]:
    found = fleet.wait(fleet.routed.http.get("/workers")).json()["workers"]
    return {one["url"] for one in found if one["is_healthy"]}


def test_a_worker_left_behind_is_out_of_rotation_until_it_alone_was_published_to(fleet) -> None:
    found, engines = fleet
    first, second = (server.url for server in found.servers)
    assert engines.behind(0) == [] and engines.base == 1
    engines.targets[0].send(SetVersion(version=5))
    assert engines.behind(5) == [second]
    assert in_rotation(found) == {first}
    done: dict[str, RequestOutput] = {}
    asked = [request(f"r{i}", [1, i], max_new_tokens=4) for i in range(6)]
    assert engines.generate(asked, done) is None
    assert {span.version for output in done.values() for span in output.spans} == {5}
    engines.targets[1].send(SetVersion(version=5))
    assert engines.behind(5) == [] and in_rotation(found) == {first, second}
    assert engines.state().version == 5
    engines.flush()


def test_what_another_trainer_published_is_told(fleet) -> None:
    _, engines = fleet
    engines.targets[1].send(SetVersion(version=9))
    with pytest.raises(UpdateOrder, match="version 9 is served there, which this run did not"):
        engines.behind(0)


def test_a_worker_that_is_lost_is_left_out_and_one_that_comes_is_found(fleet) -> None:
    found, engines = fleet
    assert not engines.is_loss(ManifestMismatch("x"))
    assert engines.is_loss(EngineDead("x")) and engines.is_loss(FleetDivided("x"))
    gone = found.servers[1]
    found.wait(found.routed.http.delete(f"/workers/{engines.workers[1].id}"))
    assert engines.is_loss(ManifestMismatch("x")), "another took part"
    assert [worker.url for worker in engines.workers] == [found.servers[0].url]
    found.wait(found.routed.http.post("/workers", json={"url": gone.url}))
    while len(engines.targets) < 2:
        engines.revive()
    with pytest.raises(EngineDead, match="does not answer"):
        replace_port(engines, 1).send(GetState())


def replace_port(engines: RoutedEngines, place: int):
    """The target of a worker that nobody listens for any more."""
    target = engines.targets[place]
    target.url = "http://127.0.0.1:9"
    return target


def test_a_server_of_another_model_takes_no_update(fleet) -> None:
    found, engines = fleet

    async def add() -> None:
        async with live(served_model_name="other") as other:
            await found.routed.http.post("/workers", json={"url": other.url})
            await found.routed.until(lambda: all(w.joined for w in found.routed.router.fleet))
            names = [worker.url for worker in found.routed.router.fleet if not worker.alike]
            assert names == [other.url]
            reply = await found.routed.http.post("/pause_generation", json={})
            assert reply.status_code == 200 and other.url not in reply.json()["workers"]
            assert "'other'" in reply.json()["out_of_rotation"][other.url]

    found.wait(add())
    engines.revive()
    assert len(engines.targets) == 2


def test_a_router_without_a_worker_is_waited_for_and_named() -> None:
    with live_fleet(0) as found, HttpReplica(found.url) as replica:
        started = time.monotonic()
        with pytest.raises(EngineDead, match="it has no worker") as caught:
            RoutedEngines(replica, admin_key="", patience_s=0.2)
        assert caught.value.field == "endpoint" and time.monotonic() - started > 0.2
    told = f"{found.url} cannot be used for 0.2 s: no answer"
    with HttpReplica(found.url) as replica, pytest.raises(EngineDead, match=told):
        RoutedEngines(replica, admin_key="", patience_s=0.2)


def test_where_no_worker_says_what_it_is_its_refusal_is_told(fleet) -> None:
    found, engines = fleet
    engines.targets[:] = [HttpTarget(f"{found.url}/workers/nobody")]
    with pytest.raises(SlipstreamError, match="no worker 'nobody' is registered"):
        engines.state()


def test_a_named_call_is_the_workers_own(fleet) -> None:
    found, engines = fleet
    post = found.routed.http.post
    name = engines.workers[0].id
    reply = found.wait(post(f"/workers/{name}/command", json={"type": "commit_update"}))
    assert reply.status_code == 400 and "version" in reply.json()["error"]["message"]
    assert found.wait(post("/workers/nobody/command", json={})).status_code == 404
    assert found.wait(post(f"/workers/{name}/generate", json={})).status_code == 404
