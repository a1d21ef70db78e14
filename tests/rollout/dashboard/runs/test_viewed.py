"""`python -m rollout view`: one run, a folder of runs, and what is neither."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from engine.errors import InvalidRequest
from rollout.__main__ import parse
from rollout.cli.view import View
from rollout.dashboard.runs import viewed
from rollout.dashboard.runs.viewed import run_names, viewed_app
from rollout.dashboard.standalone import PageConfig
from rollout.replica.python_child import child_command, child_environment
from tests.helpers.children import heed_interrupts
from tests.helpers.run_folders import run_folder


def get(folder: Path, *paths: str, host: str = "127.0.0.1") -> list[httpx.Response]:
    app, _ = viewed_app(folder, PageConfig())

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}:1") as client:
            return [await client.get(path) for path in paths]

    return asyncio.run(ask())


def test_a_run_has_its_page(tmp_path: Path) -> None:
    run_folder(tmp_path / "run")
    page, now, root, group = get(
        tmp_path / "run",
        *("/dashboard", "/dashboard/api/now", "/", "/dashboard/api/rollouts/1-1"),
    )
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert now.json()["snapshot"]["title"] == "run"
    assert root.headers["location"] == "/dashboard"
    assert group.json()["samples"][0]["tokens"]["versions"][0] == "0"


def test_a_folder_of_runs_is_a_list_with_a_page_each(tmp_path: Path) -> None:
    for name in ("a", "b & <i>"):
        run_folder(tmp_path / name)
    (tmp_path / "no run").mkdir()
    assert sorted(run_names(tmp_path)) == ["a", "b & <i>"]
    there = f"/runs/{httpx.URL('/b & <i>').raw_path.decode()[1:]}"
    home, page, now, gone, above = get(
        tmp_path,
        *("/", f"{there}/dashboard", f"{there}/dashboard/api/now", "/runs/c/dashboard"),
        "/runs/%2e%2e/dashboard/api/now",
    )
    assert "b &amp; &lt;i&gt;" in home.text and "<i>" not in home.text
    (link,) = (found for found in re.findall(r'href="([^"]+)"', home.text) if "%26" in found)
    assert get(tmp_path, f"/{link}")[0].status_code == 200
    assert page.status_code == 200 and now.json()["snapshot"]["title"] == "b & <i>"
    assert gone.status_code == above.status_code == 404
    assert "UnknownRun" in gone.text
    assert get(tmp_path, "/", host="evil.example")[0].status_code == 403


def test_what_is_no_run_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(str(tmp_path))):
        viewed_app(tmp_path, PageConfig())
    with pytest.raises(InvalidRequest, match="run: cannot read"):
        viewed_app(tmp_path / ("x" * 300), PageConfig())
    run_folder(tmp_path / "run")
    with pytest.raises(InvalidRequest, match="list of runs has no key"):
        viewed_app(tmp_path, PageConfig(api_key="x"))


def test_the_command_prints_its_address_and_ends_with_an_interrupt(tmp_path: Path) -> None:
    assert parse(["view", str(tmp_path), "--port", "1"]) == View(run=str(tmp_path), port=1)
    run_folder(tmp_path / "run")
    words = child_command("rollout", "view", str(tmp_path / "run"))
    with subprocess.Popen(
        words,
        env=child_environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    ) as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/dashboard", said)
        assert found is not None, said
        assert httpx.get(f"{found.group()}/api/now", timeout=30).json()["snapshot"]["figures"]
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "interrupted\n"
    assert process.returncode == 130


def test_a_page_of_another_host_is_told_no_name(tmp_path: Path) -> None:
    run_folder(tmp_path / "secret")
    paths = ("/", "/runs/secret/dashboard", "/runs/other/dashboard", "/x")
    for reply in get(tmp_path, *paths, host="evil.example"):
        assert reply.status_code == 403 and str(tmp_path) not in reply.text


def test_names_that_are_no_utf8_and_turn_the_page(tmp_path: Path) -> None:
    name = os.fsdecode(b"a\xff\xe2\x80\xae")
    run_folder(tmp_path / name)
    (home,) = get(tmp_path, "/")
    (link,) = re.findall(r'href="([^"]+)"', home.text)
    (now,) = get(tmp_path, f"/{link}/api/now")
    title = now.json()["snapshot"]["title"]
    assert title == "a\ufffd\u202e" and f"<bdi>{title}</bdi>" in home.text
    assert get(tmp_path / name, "/dashboard/api/now")[0].status_code == 200


def test_a_run_that_cannot_be_looked_into_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        run_folder(tmp_path / name)

    def closed(folder: Path) -> bool:
        if folder.name == "a":
            raise PermissionError(13, "Permission denied")
        return True

    monkeypatch.setattr(viewed, "is_run", closed)
    assert run_names(tmp_path) == ["b"]


def test_a_folder_that_goes_while_it_is_looked_at(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    run_folder(folder / "a")
    app, _ = viewed_app(folder, PageConfig())
    shutil.rmtree(folder)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get("/")

    reply = asyncio.run(ask())
    assert reply.status_code == 400 and reply.json()["error"]["field"] == "run"
