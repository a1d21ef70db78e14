"""Jobs in a process of their own: answers, limits, and processes that end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from rollout.jobs.job_process import JobProcess

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


def test_a_job_that_takes_too_long_is_ended() -> None:
    made = JobProcess(MODULE, limit_s=0.1, memory_bytes=1 << 30)
    try:
        assert made.run(b"sleep") is None
    finally:
        made.close()


def test_a_process_that_does_not_start_gives_no_answer() -> None:
    made = JobProcess(MODULE, limit_s=60.0, memory_bytes=1 << 30, greeting=b"leave")
    try:
        assert made.run(b"you") is None
    finally:
        made.close()


def test_only_the_job_that_is_meant_is_interrupted(process: JobProcess) -> None:
    job, other = object(), object()
    answers: list[bytes | None] = []
    thread = threading.Thread(target=lambda: answers.append(process.run(b"sleep", job)))
    thread.start()
    deadline = time.monotonic() + 60
    while process._job is not job:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.interrupt(other)
    assert process._process is not None and process._process.poll() is None
    process.interrupt(job)
    thread.join(60)
    assert answers == [None]
