"""Jobs in a process of their own: answers, limits, and processes that end."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from rollout.jobs import job_process
from rollout.jobs.job_process import JobLate, JobProcess
from tests.helpers.peers import until

MODULE = "tests.helpers.odd_jobs"


@pytest.fixture(scope="module")
def process() -> Iterator[JobProcess]:
    made = JobProcess(MODULE, limit_s=60.0, memory_bytes=1 << 30, greeting=b"hello ")
    yield made
    made.close()


def test_jobs_are_answered_by_one_process(process: JobProcess) -> None:
    assert process.run(b"you") == b"hello you"
    first = process._process
    assert process.run(b"") == b"hello "
    assert process._process is first


@pytest.mark.parametrize("job", [b"exit", b"raise", b"grow"])
def test_a_process_that_ends_gives_no_answer_and_the_next_job_has_another(
    process: JobProcess, job: bytes
) -> None:
    assert process.run(job) is None
    assert process.run(b"you") == b"hello you"


def test_a_job_that_uses_up_its_processor_time_is_ended() -> None:
    made = JobProcess(MODULE, limit_s=0.1, memory_bytes=1 << 30)
    try:
        assert made.run(b"spin") is None
        assert made.run(b"you") == b"you"
    finally:
        made.close()


def test_a_job_that_does_not_get_its_processor_time_is_late_and_not_at_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job_process, "_PATIENCE", 0.01)
    made = JobProcess(MODULE, limit_s=10.0, memory_bytes=1 << 30)
    try:
        with pytest.raises(JobLate, match="send it again"):
            made.run(b"sleep")
        monkeypatch.undo()
        assert made.run(b"you") == b"you"
    finally:
        made.close()


def test_a_process_that_does_not_start_gives_no_answer() -> None:
    made = JobProcess(MODULE, limit_s=60.0, memory_bytes=1 << 30, greeting=b"leave")
    try:
        assert made.run(b"you") is None
    finally:
        made.close()


def test_only_the_job_that_is_meant_is_interrupted(process: JobProcess) -> None:
    stop = threading.Event()
    answers: list[bytes | None] = []
    thread = threading.Thread(target=lambda: answers.append(process.run(b"sleep", stop)))
    thread.start()
    until(lambda: process._stop is stop and process._process is not None)
    process.interrupt(threading.Event())
    assert process._process is not None and process._process.poll() is None
    process.interrupt(stop)
    thread.join(60)
    assert answers == [None]
    assert process.run(b"you") == b"hello you"


def test_a_job_that_was_interrupted_before_its_turn_does_not_begin(process: JobProcess) -> None:
    stop = threading.Event()
    process.interrupt(stop)
    assert process.run(b"sleep", stop) is None
    assert process.run(b"you") == b"hello you"


def test_a_job_may_be_interrupted_while_its_process_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = JobProcess(MODULE, limit_s=600.0, memory_bytes=1 << 30, greeting=b"hello ")
    started = JobProcess._started

    def interrupted(self: JobProcess) -> object:
        self.interrupt()
        return started(self)

    monkeypatch.setattr(JobProcess, "_started", interrupted)
    assert made.run(b"sleep") is None
    monkeypatch.undo()
    assert made.run(b"you") == b"hello you"
    made.close()
