"""The process that renders chat templates: one job a line of its input, one answer each.

Started by `render_process.RenderProcess` alone. Whatever a template does stays in here: memory
has a limit, and a job that runs on after its time is ended by the alarm, also when nobody is left
who could kill this process.
"""

from __future__ import annotations

import json
import math
import resource
import signal
import sys
from typing import Any, BinaryIO

from engine.errors import InvalidRequest, SlipstreamError
from rollout.text.chat_template import ChatTemplate


def main(memory_bytes: int) -> None:
    """Answer jobs until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    templates: dict[str, ChatTemplate] = {}
    while (line := _read(sys.stdin.buffer)) is not None:
        job = json.loads(line)
        signal.alarm(math.ceil(job["limit_s"]) + 1)
        answer = _answer(job, templates)
        signal.alarm(0)
        data = json.dumps(answer).encode()
        sys.stdout.buffer.write(len(data).to_bytes(8, "little") + data)
        sys.stdout.buffer.flush()


def _read(source: BinaryIO) -> bytes | None:
    size = source.read(8)
    return source.read(int.from_bytes(size, "little")) if len(size) == 8 else None


def _answer(job: dict[str, Any], templates: dict[str, ChatTemplate]) -> dict[str, str]:
    source = job["source"]
    try:
        if source not in templates:
            # The model's own comes again and again; those of requests may all differ.
            templates.clear()
            templates[source] = ChatTemplate(source, job["special_tokens"])
        text = templates[source].write(
            job["messages"], job["variables"], max_chars=job["max_chars"]
        )
    except MemoryError:
        error: SlipstreamError = InvalidRequest(
            "the chat template takes more memory than it may", field="messages"
        )
    except SlipstreamError as found:
        error = found
    else:
        return {"text": text}
    return {"kind": type(error).__name__, "message": error.message, "field": error.field}


if __name__ == "__main__":
    main(int(sys.argv[1]))
