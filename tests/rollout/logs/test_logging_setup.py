"""The log of a process by its options, as it comes out."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.children import ROOT, child_environment

CODE = """
import logging, sys
from rollout.logs.logging_setup import set_up_logging
set_up_logging({form!r}, {level!r}, process="p", access={access})
logging.getLogger("a.b").debug("one %d", 1)
logging.getLogger("a.b").warning("two")
logging.getLogger("rollout.access").info("three", extra={{"fields": {{"status": 200}}}})
logging.getLogger("httpx").info("noise")
try:
    raise ValueError("four")
except ValueError:
    logging.getLogger("a.b").exception("failed")
"""


def logged(form: str, level: str, *, access: bool) -> list[str]:
    code = CODE.format(form=form, level=level, access=access)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=child_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stderr.splitlines()


def test_every_line_is_an_object() -> None:
    found = [json.loads(line) for line in logged("json", "debug", access=True)]
    assert [line["message"] for line in found] == ["one 1", "two", "three", "failed"]
    assert [line["level"] for line in found] == ["debug", "warning", "info", "error"]
    assert all(line["process"] == "p" and line["time"].endswith("+00:00") for line in found)
    assert found[2]["status"] == 200
    assert found[3]["exception"].splitlines()[-1] == "ValueError: four"


@pytest.mark.parametrize(
    "level,access,expected",
    [("info", False, ["two"]), ("error", False, []), ("error", True, ["three"])],
)
def test_levels_and_the_access_log(level: str, access: bool, expected: list[str]) -> None:
    lines = logged("text", level, access=access)
    assert lines[: lines.index("p: failed")] == [f"p: {text}" for text in expected]
