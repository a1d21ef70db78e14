"""Progress of a file of requests: a bar in a terminal, log lines elsewhere."""

import logging

import msgspec
import pytest

from rollout.cli.progress_bar import ProgressDisplay, kv_use
from rollout.requests.generate import Progress, generate
from tests.helpers.replicas import inline, make_request


def test_log_lines_without_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with inline() as replica, ProgressDisplay(replica, terminal=False) as display:
        generate(replica, [make_request("a", [1]), make_request("b", [2])], on_progress=display)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith("2 of 2 requests done")
    assert "tokens/s" in lines[0]


def test_bar_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with inline() as replica, ProgressDisplay(replica, terminal=True) as display:
        generate(replica, [make_request("a", [1])], on_progress=display)
        display(Progress(num_done=1, num_requests=1, num_tokens=8))
    captured = capsys.readouterr()
    assert "1/1" in captured.err
    assert "tok/s" in captured.err
    assert captured.out == ""


def test_kv_use_is_the_share_neither_free_nor_cached() -> None:
    with inline() as replica:
        state = replica.state()
    assert kv_use(state) == 0
    half = msgspec.structs.replace(state, free_pages=64, cached_pages=64, total_pages=256)
    assert kv_use(half) == 0.5
    assert kv_use(msgspec.structs.replace(state, total_pages=0)) == 0
