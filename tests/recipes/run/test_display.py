"""What a person sees: a table in a terminal, lines elsewhere."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from recipes.actors.actor import Generation
from recipes.run.display import COLUMNS, Display, cells, fitting

ROW = {"step": 3, "reward": 0.5, "timing_s/generate": 1.25, "eval/accuracy": 0.75}


def test_cells_show_what_the_row_has() -> None:
    shown = dict(zip([title for title, _, _ in COLUMNS], cells(ROW), strict=True))
    assert (shown["step"], shown["reward"], shown["held-out"]) == ("3", "0.500", "0.750")
    assert shown["entropy"] == "-"


def test_lines_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    with caplog.at_level(logging.INFO), Display("run", 5, console) as display:
        display.note("evaluating")
        display.show(ROW)
    assert "evaluating" in caplog.text
    assert "reward 0.500" in caplog.text


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_a_narrow_terminal_drops_columns_and_cuts_no_figure(width: int) -> None:
    out = io.StringIO()
    row = {key: 12.5 if key.startswith("timing_s") else 1.25e-5 for _, key, _ in COLUMNS}
    with Display("run", 5, Console(file=out, force_terminal=True, width=width)) as display:
        display.show({**row, "step": 3})
    table = [line for line in out.getvalue().splitlines() if "\u2501" not in line]
    assert "\u2026" not in "".join(table), "a cell was cut"
    assert fitting(width) <= fitting(200) == {title for title, _, _ in COLUMNS}
    assert {"step", "reward", "held-out", "step s"} <= fitting(width)


def test_a_rollout_under_way_in_a_terminal() -> None:
    out = io.StringIO()
    now = Generation(num_done=12, num_requests=64, tokens_per_s=1234.5, kv_use=0.25)
    with Display("my run", 5, Console(file=out, force_terminal=True, width=200)) as display:
        display.generating(now)
    assert "12/64 replies, 1,234 tok/s, KV 25%" in out.getvalue()


def test_a_table_in_a_terminal() -> None:
    out = io.StringIO()
    with Display("my run", 5, Console(file=out, force_terminal=True, width=200)) as display:
        display.show(ROW)
    assert "my run" in out.getvalue() and "0.750" in out.getvalue()
    assert "3/5" in out.getvalue()


def test_what_is_pinned_stays_above_the_table(caplog: pytest.LogCaptureFixture) -> None:
    out = io.StringIO()
    with Display("my run", 5, Console(file=out, force_terminal=True, width=200)) as display:
        display.pin("dashboard: http://127.0.0.1:1/dashboard")
        display.note("evaluating")
        display.show(ROW)
    assert "http://127.0.0.1:1/dashboard" in out.getvalue().rpartition("my run")[2]
    console = Console(file=io.StringIO(), force_terminal=False)
    with caplog.at_level(logging.INFO):
        Display("run", 5, console).pin("dashboard: x")
    assert "dashboard: x" in caplog.text
