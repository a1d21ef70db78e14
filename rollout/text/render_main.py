"""The process that renders chat templates; started by `render_process.RenderProcess` alone."""

from __future__ import annotations

import json
import sys
from typing import Any

from engine.errors import InvalidRequest, SlipstreamError
from rollout.jobs.job_loop import Answer, serve_jobs
from rollout.text.chat_template import ChatTemplate


def start(_: bytes) -> Answer:
    """What answers a job: `RenderJob` as JSON, to its text or its error."""
    templates: dict[str, ChatTemplate] = {}
    return lambda data: json.dumps(_answer(json.loads(data), templates)).encode()


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
    serve_jobs(start, sys.argv[1:])
