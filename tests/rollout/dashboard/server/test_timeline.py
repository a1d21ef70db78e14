"""What becomes an event of a server's timeline."""

from __future__ import annotations

from engine.protocol import (
    BeginUpdate,
    CommitUpdate,
    ErrorInfo,
    GetState,
    Pause,
    ReleaseMemory,
    Reply,
    Resume,
    ResumeMemory,
    UpdateReport,
)
from rollout.dashboard.server.timeline import Timeline


class Clock:
    """Unix seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_an_update_is_one_event_with_its_time_and_size() -> None:
    clock = Clock()
    timeline = Timeline({3: "step-3"}.__getitem__, clock)
    timeline.note(BeginUpdate(version=3, manifest=[]), Reply())
    clock.now += 2.5
    report = UpdateReport(version=3, num_tensors=20, num_bytes=3 << 20, seconds=0.5)
    timeline.note(CommitUpdate(version=3), Reply(report=report))
    (event,) = timeline.page(0).events
    assert (event.kind, event.version, event.seconds) == ("version", "step-3", 2.5)
    assert event.text == "version step-3: 20 tensors, 3 MiB"
    assert timeline.page(1).events == []


def test_a_pause_is_told_once_and_its_end_says_how_long_it_was() -> None:
    clock = Clock()
    timeline = Timeline(str, clock)
    for command in (Resume(), Pause(), Pause(mode="abort"), GetState()):
        timeline.note(command, Reply())
    clock.now += 4.0
    timeline.note(Resume(), Reply())
    assert [(e.kind, e.seconds) for e in timeline.page(0).events] == [
        ("pause", None),
        ("resume", 4.0),
    ]


def test_sleep_and_a_new_engine() -> None:
    timeline = Timeline(str)
    timeline.note(ReleaseMemory(tags=["kv_cache"]), Reply())
    timeline.note(ResumeMemory(), Reply())
    timeline.restarted()
    assert [e.text for e in timeline.page(0).events] == [
        "released kv_cache",
        "took back all memory",
        "the engine was started again",
    ]


def test_what_callers_say_at_length_is_cut() -> None:
    timeline = Timeline({3: "v" * 100_000}.__getitem__, Clock())
    error = ErrorInfo(kind="InvalidRequest", message="m" * 100_000)
    timeline.note(Pause(), Reply(error=error))
    timeline.note(CommitUpdate(version=3), Reply())
    failed, committed = timeline.page(0).events
    assert failed.text.startswith("a pause failed: m") and committed.version.startswith("v")
    assert max(len(failed.text), len(committed.text), len(committed.version)) < 600
