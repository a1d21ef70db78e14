"""A step that hangs: whose stacks are logged, with what, and where they stay."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
from pathlib import Path

import pytest

from rollout.logs.stack_dump import StackDump, note_rows
from rollout.replica.pulse import Activity, Pulse, PulseWatch
from rollout.replica.spawned import ProcessReplica
from tests.helpers.replicas import FACTORY, fake_config, make_request


@pytest.mark.slow
def test_the_stacks_of_a_step_that_hangs_are_logged_with_its_rows(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = fake_config("hang")
    with (
        caplog.at_level(logging.ERROR),
        ProcessReplica(config, factory=FACTORY, start_s=60.0, stuck_s=2.0) as replica,
    ):
        replica.submit([make_request("stuck-row", [1, 2, 3])])
        deadline = time.monotonic() + 60
        while not caplog.records and time.monotonic() < deadline:
            replica.step()
        # It would be given its time to leave.
        replica._process.kill()
        replica._process.wait()
    (record,) = caplog.records
    text = record.getMessage()
    assert re.match(r"leader process \d+ has been at .* for \d+ s\n", text)
    assert "1 sequences: stuck-row" in text
    assert "--- leader, process" in text
    # The fake's own function is at the end of the main thread's stack, and the beat goes on.
    assert "fake_executor.py" in text and "pulse.py" in text
    kept = Path(text.rpartition("This is in ")[2].removesuffix(" too."))
    assert "fake_executor.py" in kept.read_text()
    assert kept.parent.stat().st_mode & 0o077 == 0
    kept.unlink()


def test_whatever_is_stuck_is_told_once(tmp_path: Path) -> None:
    pulse, watch = Pulse(tmp_path / "p"), PulseWatch(tmp_path / "p")
    pulse.start()
    pulse.begin(Activity.STEP, 100.0)
    now = time.monotonic()
    told = []
    for second in range(12):
        watch.look(now + second)
        told.append(watch.stuck(3.0))
    assert [text for text in told if text] == ["has been at one step for 4 s"]
    pulse.begin(Activity.WAITING)
    for second in range(12, 30):
        watch.look(now + second)
        assert watch.stuck(1000.0) == ""
    pulse.stop()


def test_rows_are_named_up_to_a_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    note_rows(tmp_path, [f"r{number}" for number in range(100)])
    dump = StackDump(tmp_path)
    with caplog.at_level(logging.ERROR):
        dump.ask("is slow")
        assert dump.asked
        dump.take("it")
    assert not dump.asked
    text = caplog.records[0].getMessage()
    assert "100 sequences: r0, r1" in text and "r63 and 36 more" in text
    Path(text.rpartition("This is in ")[2].removesuffix(" too.")).unlink()


def test_a_folder_that_others_made_is_not_written_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / f"slipstream-stacks-{os.getuid()}").symlink_to(elsewhere)
    with caplog.at_level(logging.ERROR):
        StackDump(tmp_path).take("it")
    kept = Path(caplog.records[0].getMessage().rpartition("This is in ")[2].removesuffix(" too."))
    assert not list(elsewhere.iterdir())
    assert kept.exists() and kept.parent.stat().st_mode & 0o077 == 0


def test_stacks_that_cannot_be_kept_are_logged_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    note_rows(tmp_path, ["wörd-\udc80"])
    with caplog.at_level(logging.ERROR):
        StackDump(tmp_path).take("it")
    text = caplog.records[0].getMessage()
    assert "wörd-" in text and "could not be kept in a file" in text
