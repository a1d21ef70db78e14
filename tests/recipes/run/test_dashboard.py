"""The page beside a run: it starts where it is asked for, ends with the run, and fails nothing."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from recipes.run import dashboard
from recipes.run.dashboard import HOST, dashboard_beside, port_of
from rollout.replica.python_child import child_environment
from tests.helpers.run_folders import run_folder


def test_where_it_is_asked_for() -> None:
    assert port_of("off", is_terminal=True) is port_of("auto", is_terminal=False) is None
    assert port_of("auto", is_terminal=True) == port_of("on", is_terminal=False) == 0
    assert port_of("8123", is_terminal=False) == 8123


def address(said: list[str]) -> str:
    found = re.search(r"http://\S+", said[0])
    assert found is not None, said
    return found.group()


def test_it_shows_the_run_and_ends_with_it(tmp_path: Path) -> None:
    run_folder(tmp_path)
    said: list[str] = []
    with dashboard_beside("on", tmp_path, said.append):
        url = address(said)
        assert httpx.get(f"{url}/api/now", timeout=30).json()["series"]["x"] == [0, 1, 2, 3]
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)
    assert len(said) == 1


def test_a_port_in_use_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    run_folder(tmp_path)
    said: list[str] = []
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        with dashboard_beside(str(port), tmp_path, said.append):
            pass
    assert len(said) == 1 and f"cannot listen at {HOST}:{port}" in said[0]


def test_a_page_that_cannot_start_is_told_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with dashboard_beside("on", tmp_path / "gone", said.append):
        deadline = time.monotonic() + 60
        while len(said) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert said[1].startswith("the dashboard ended: InvalidRequest (run)"), said
    monkeypatch.setattr(dashboard, "child_command", lambda *words: ["/no/such/program"])
    said.clear()
    with dashboard_beside("on", tmp_path, said.append):
        pass
    assert len(said) == 1 and said[0].startswith("no dashboard: cannot start its process")


def test_it_does_not_outlive_a_run_that_is_killed(tmp_path: Path) -> None:
    run_folder(tmp_path)
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from recipes.run.dashboard import dashboard_beside\n"
        "with dashboard_beside('on', Path(sys.argv[1]), lambda said: print(said, flush=True)):\n"
        "    time.sleep(600)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(
        words, env=child_environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = address([process.stdout.readline()])
        assert httpx.get(url, timeout=30).status_code == 200
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            httpx.get(url, timeout=5)
        except httpx.HTTPError:
            return
        time.sleep(0.1)
    pytest.fail("the page is still there")
