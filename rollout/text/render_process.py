"""Render a chat template in a process that can be stopped.

For templates that a request brings, and for conversations so large that the event loop would
stand still. The process is started by the first job and serves the next; one that misses its time
is killed.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from engine.errors import InvalidRequest, SlipstreamError, by_name
from rollout.replica.python_child import child_command, child_environment
from rollout.text.messages import Message

_MEMORY_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class RenderJob:
    """One conversation to render. max_chars: the longest text it may give."""

    source: str
    special_tokens: Mapping[str, str]
    messages: Sequence[Message]
    variables: Mapping[str, Any]
    max_chars: int


class RenderProcess:
    """At most one process, which renders one job after the other.

    limit_s: time of a job. memory_bytes: address space of the process.
    """

    def __init__(self, *, limit_s: float = 5.0, memory_bytes: int = _MEMORY_BYTES) -> None:
        self._limit_s = limit_s
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()
        # Guards the two below: an interrupt must not meet the job after its own.
        self._state = threading.Lock()
        self._job: RenderJob | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._remove: weakref.finalize[Any, Any] | None = None

    def render(self, job: RenderJob) -> str:
        """The text. Blocks, so the caller has a thread for it.

        Raises InvalidRequest naming `messages` or `chat_template`, also for a job that takes
        more time or memory than it may.
        """
        data = _encode(job, self._limit_s)
        with self._lock:
            process = self._started()
            with self._state:
                self._job = job
            timer = threading.Timer(self._limit_s, process.kill)
            timer.start()
            try:
                answer = _exchange(process, data)
            finally:
                with self._state:
                    self._job = None
                timer.cancel()
            if answer is None:
                self._close()
        if answer is None:
            raise InvalidRequest(
                f"the chat template took longer than {self._limit_s:g} s, or more memory than "
                f"{self._memory_bytes >> 20} MiB, for these messages",
                field="messages",
            )
        if "text" in answer:
            return answer["text"]
        error: SlipstreamError = by_name(answer["kind"], answer["message"], answer["field"])
        raise error

    def interrupt(self, job: RenderJob | None = None) -> None:
        """End `job`, or whichever it is, if the process is at it; its caller gets InvalidRequest.
        From any thread."""
        with self._state:
            process, found = self._process, self._job
            if process is not None and found is not None and (job is None or job is found):
                process.kill()

    def close(self) -> None:
        """End the process, and with it the job that it is at. Idempotent."""
        self.interrupt()
        with self._lock:
            self._close()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._close()
            self._process = subprocess.Popen(
                child_command("rollout.text.render_main", str(self._memory_bytes)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=child_environment(),
                start_new_session=True,
            )
            self._remove = weakref.finalize(self, _end, self._process)
        return self._process

    def _close(self) -> None:
        if self._remove is not None:
            self._remove()
        self._process = self._remove = None


def _encode(job: RenderJob, limit_s: float) -> bytes:
    fields = {
        "source": job.source,
        "special_tokens": job.special_tokens,
        "messages": job.messages,
        "variables": job.variables,
        "max_chars": job.max_chars,
        "limit_s": limit_s,
    }
    try:
        return json.dumps(fields).encode()
    except (ValueError, TypeError, RecursionError) as error:
        # An integer of thousands of digits, say.
        raise InvalidRequest(f"messages cannot be rendered: {error}", field="messages") from error


def _exchange(process: subprocess.Popen[bytes], data: bytes) -> dict[str, str] | None:
    """The answer; None if the process ended instead of giving one."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(len(data).to_bytes(8, "little") + data)
        process.stdin.flush()
        size = process.stdout.read(8)
        answer = process.stdout.read(int.from_bytes(size, "little")) if len(size) == 8 else b""
    except BrokenPipeError:
        return None
    if not answer or len(answer) < int.from_bytes(size, "little"):
        return None
    found: dict[str, str] = json.loads(answer)
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    pipes: list[IO[bytes] | None] = [process.stdin, process.stdout]
    for pipe in pipes:
        if pipe is not None:
            # What was still to be written is for nobody.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
