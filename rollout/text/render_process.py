"""Render a chat template in a process that can be stopped.

For templates that a request brings, and for conversations so large that the event loop would
stand still.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRequest, SlipstreamError, by_name
from rollout.jobs.job_process import JobProcess
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

    limit_s: processor time of a job. memory_bytes: address space that jobs may take.
    """

    def __init__(self, *, limit_s: float = 5.0, memory_bytes: int = _MEMORY_BYTES) -> None:
        self._limit_s = limit_s
        self._memory_bytes = memory_bytes
        self._process = JobProcess(
            "rollout.text.render_main", limit_s=limit_s, memory_bytes=memory_bytes
        )

    def render(self, job: RenderJob, stop: threading.Event | None = None) -> str:
        """The text. Blocks, so the caller has a thread for it. stop: what `interrupt` knows the
        job by.

        Raises InvalidRequest naming `messages` or `chat_template`, also for a job that takes
        more time or memory than it may; JobLate for one that did not get that time.
        """
        data = self._process.run(_encode(job), stop)
        if data is None:
            raise InvalidRequest(
                f"the chat template took longer than {self._limit_s:g} s, or more memory than "
                f"{self._memory_bytes >> 20} MiB, for these messages",
                field="messages",
            )
        answer: dict[str, str] = json.loads(data)
        if "text" in answer:
            return answer["text"]
        error: SlipstreamError = by_name(answer["kind"], answer["message"], answer["field"])
        raise error

    def interrupt(self, stop: threading.Event) -> None:
        """End the job that has this `stop`, or see that it does not begin; its caller gets
        InvalidRequest. From any thread."""
        self._process.interrupt(stop)

    def close(self) -> None:
        """End the process, and with it the job that it is at. Idempotent."""
        self._process.close()


def _encode(job: RenderJob) -> bytes:
    fields = {
        "source": job.source,
        "special_tokens": job.special_tokens,
        "messages": job.messages,
        "variables": job.variables,
        "max_chars": job.max_chars,
    }
    try:
        return json.dumps(fields).encode()
    except (ValueError, TypeError, RecursionError) as error:
        # An integer of thousands of digits, say.
        raise InvalidRequest(f"messages cannot be rendered: {error}", field="messages") from error
