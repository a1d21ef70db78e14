"""The page of a run as an application of its own: what it sends, and to whom."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from engine.errors import InvalidRequest
from rollout.dashboard.page_files import file_names
from rollout.dashboard.standalone import PageConfig, page_app
from tests.helpers.dashboard_source import MadeUpSource

KEY = {"authorization": "Bearer sesame"}
DATA = ("now", "live", "rollouts", "rollouts/g1")


def ask(test: Callable[[httpx.AsyncClient], Awaitable[None]], **config: Any) -> None:
    """Run a test with a client of the page."""

    async def run() -> None:
        transport = httpx.ASGITransport(page_app(MadeUpSource(), PageConfig(**config)))
        base = "http://127.0.0.1:30100"
        async with httpx.AsyncClient(transport=transport, base_url=base) as client:
            await test(client)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_the_page_and_its_files_need_no_key_and_the_data_does() -> None:
    async def test(client: httpx.AsyncClient) -> None:
        page = await client.get("/dashboard")
        assert page.status_code == 200
        for name in file_names():
            assert (await client.get(f"/dashboard/static/{name}")).status_code == 200
        for path in DATA:
            for headers in ({}, {"authorization": "Bearer x"}, {"authorization": "sesame"}):
                reply = await client.get(f"/dashboard/api/{path}", headers=headers)
                assert reply.status_code == 401, path
                assert reply.json()["error"]["field"] == "Authorization"
            in_url = await client.get(f"/dashboard/api/{path}?key=sesame&api_key=sesame")
            assert in_url.status_code == 401
        assert (await client.get("/dashboard/api/now", headers=KEY)).status_code == 200

    ask(test, api_key="sesame")


def test_a_path_that_goes_up_reaches_nothing() -> None:
    async def test(client: httpx.AsyncClient) -> None:
        for path in ("..%2fapi%2fnow", "..%2f..%2fstandalone.py", "%2e%2e", "__init__.py", "x"):
            reply = await client.get(f"/dashboard/static/{path}")
            assert reply.status_code in (401, 404), path

    ask(test, api_key="sesame")


def test_the_page_loads_nothing_from_elsewhere_and_runs_no_inline_code() -> None:
    async def test(client: httpx.AsyncClient) -> None:
        for name in file_names():
            reply = await client.get(f"/dashboard/static/{name}")
            policy = reply.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
            assert set(re.findall(r"https?://[\w./-]+", reply.text)) <= {
                "http://www.w3.org/2000/svg"
            }
            assert not re.search(
                r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", reply.text
            )
        page = (await client.get("/dashboard")).text
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", page)

    ask(test)


def test_a_browser_that_has_a_file_is_not_sent_it_again() -> None:
    async def test(client: httpx.AsyncClient) -> None:
        first = await client.get("/dashboard")
        tag = {"if-none-match": first.headers["etag"]}
        again = await client.get("/dashboard", headers=tag)
        assert (again.status_code, again.content) == (304, b"")

    ask(test)


def test_all_files_together_are_small() -> None:
    async def test(client: httpx.AsyncClient) -> None:
        sizes = [len((await client.get(f"/dashboard/static/{n}")).content) for n in file_names()]
        assert sum(sizes) < 100_000

    ask(test)


def test_pages_of_other_origins_get_nothing() -> None:
    async def test(client: httpx.AsyncClient) -> None:
        for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}):
            for path in ("/dashboard", "/dashboard/api/now"):
                assert (await client.get(path, headers=headers)).status_code == 403

    ask(test)


def test_rollouts_are_asked_for_by_a_checked_query() -> None:
    async def test(client: httpx.AsyncClient) -> None:
        page = (await client.get("/dashboard/api/rollouts?sort=reward&limit=3&offset=1")).json()
        assert (page["offset"], page["total"], len(page["rows"])) == (1, 40, 3)
        last = (await client.get("/dashboard/api/rollouts?sort=reward&offset=39")).json()["rows"]
        assert [row["reward"] for row in last] == ["Infinity"]
        for query in ("limit=0", "limit=501", "sort=x", "offset=-1", "step=x", "odd=1"):
            reply = await client.get(f"/dashboard/api/rollouts?{query}")
            assert reply.status_code == 400, query
        group = (await client.get("/dashboard/api/rollouts/g1")).json()
        assert len(group["samples"]) == 8
        missing = await client.get("/dashboard/api/rollouts/none")
        assert missing.json()["error"]["type"] == "UnknownGroup"
        assert missing.status_code == 404

    ask(test)


def test_numbers_that_are_not_finite_travel_as_gaps_and_names() -> None:
    async def test(client: httpx.AsyncClient) -> None:
        reply = await client.get("/dashboard/api/now")
        assert "NaN" in reply.text  # As a string: `json` would else refuse it below.
        now = reply.json()
        assert now["series"]["columns"]["reward"][7] is None
        assert {f["name"]: f["value"] for f in now["snapshot"]["figures"]}["kl"] == "NaN"

    ask(test)


def test_beyond_loopback_a_key_is_needed() -> None:
    with pytest.raises(InvalidRequest, match="--api-key"):
        PageConfig(host="0.0.0.0")
    PageConfig(host="0.0.0.0", api_key="sesame")


def test_a_key_of_the_command_line_that_is_no_utf8_is_the_bytes_that_were_given() -> None:
    async def test(client: httpx.AsyncClient) -> None:
        for key, status in ((b"\xff", 200), (b"?", 401)):
            headers = {b"authorization": b"Bearer " + key}
            reply = await client.get("/dashboard/api/now", headers=headers)
            assert reply.status_code == status

    ask(test, api_key="\udcff")
