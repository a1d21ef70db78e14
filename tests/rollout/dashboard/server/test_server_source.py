"""A server's own page: its figures, its samples, and what happened to its weights."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import WeightUpdateError
from engine.protocol import CommitUpdate
from rollout.dashboard.server import sampler
from tests.helpers.http_app import Server, run, serving

PAGE = "/dashboard/api/now"


async def now(server: Server, query: str = "", **options: Any) -> Any:
    reply = await server.get(PAGE + query, **options)
    assert reply.status_code == 200, reply.text
    return reply.json()


async def events(server: Server) -> list[tuple[str, str]]:
    found = (await now(server))["events"]["events"]
    return [(event["kind"], event["text"]) for event in found]


def refuse(_: CommitUpdate) -> None:
    raise WeightUpdateError("tensor 3 is short", field="update")


def figures(page: Any) -> dict[str, Any]:
    return {figure["name"]: figure["value"] for figure in page["snapshot"]["figures"]}


def test_figures_follow_what_the_server_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.dashboard.server.server_source._STATE_AGE_S", 0.0)

    async def test() -> None:
        async with serving(served_model_name="tiny") as server:
            page = await now(server)
            assert (page["snapshot"]["title"], page["snapshot"]["kind"]) == ("tiny", "server")
            assert page["snapshot"]["state"] == "serving"
            assert page["snapshot"]["chat"] == "tiny"
            assert "run" in page["snapshot"]["rollouts"]
            assert figures(page)["cache_hits"] is None
            body = {"input_ids": list(range(1, 30)), "sampling_params": {"max_new_tokens": 4}}
            for _ in range(2):
                assert (await server.post("/generate", body)).status_code == 200
            assert figures(await now(server))["cache_hits"] > 0
            await server.post("/pause_generation", {"mode": "retract"})
            assert (await now(server))["snapshot"]["state"] == "paused (retract)"
            await server.post("/continue_generation")
            kinds = [kind for kind, _ in await events(server)]
            assert kinds == ["pause", "resume"]

    run(test)


def test_every_chart_of_the_server_has_a_sampled_column() -> None:
    async def test() -> None:
        async with serving() as server:
            before = await server.engine.state()
            source = sampler.Sampler(server.engine.state)
            source.take(before, 1.0, 1000.0)
            body = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4}}
            await server.post("/generate", body)
            source.take(await server.engine.state(max_age_s=0.0), 3.0, 1002.0)
            page = source.page(0)
            assert page.x[:2] == [1000.0, 1002.0]
            assert page.columns["generated"][:2] == [None, 2.0]
            charts = (await now(server))["snapshot"]["charts"]
            drawn = {line["name"] for chart in charts for line in chart["lines"]}
            assert drawn <= page.columns.keys()

    run(test)


def test_an_update_and_what_fails_are_on_the_timeline() -> None:
    async def test() -> None:
        async with serving() as server:
            server.link.answers[CommitUpdate] = refuse
            begin = {"type": "begin_update", "version": 7, "manifest": []}
            await server.post("/command", begin)
            await server.post("/command", {"type": "commit_update", "version": 7})
            failed = ("error", "the commit of an update failed: tensor 3 is short")
            assert await events(server) == [failed]
            await server.post("/command", {"type": "abort_update", "version": 7})
            await server.post("/command", {"type": "set_version", "version": 12})
            assert (await events(server))[1:] == [
                ("update", "the update to version 7 was dropped"),
                ("version", "the weights are called version 12"),
            ]
            assert figures(await now(server))["version"] == "12"

    run(test)


def test_nothing_of_the_server_is_shown_without_its_key() -> None:
    async def test() -> None:
        async with serving(api_key="sesame", admin_api_key="admin") as server:
            assert (await server.get("/dashboard")).status_code == 200
            assert (await server.get("/dashboard/static/index.html")).status_code == 200
            for path in (PAGE, "/dashboard/api/live", "/dashboard/api/rollouts"):
                assert (await server.get(path)).status_code == 401
            await now(server, headers={"authorization": "Bearer sesame"})

    run(test)


def test_an_engine_that_is_gone_is_told_and_its_page_stays() -> None:
    async def test() -> None:
        async with serving() as server:
            server.link.die()
            assert (await server.get(PAGE)).status_code == 503
            stream = await server.get("/dashboard/api/live")
            assert "EngineDead" in stream.text
            assert (await server.get("/dashboard")).status_code == 200
            assert (await server.get("/dashboard/api/rollouts/x")).status_code == 404

    run(test)
