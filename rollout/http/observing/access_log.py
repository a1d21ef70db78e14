"""A line for each request: who asked for what, how it went, how long it took.

Neither queries nor bodies are in it: they may hold keys, and what people say.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import Any
from urllib.parse import quote

from rollout.http.observing.call_notes import CallNotes
from rollout.logs.logging_setup import ACCESS_LOGGER

logger = logging.getLogger(ACCESS_LOGGER)

_MOST_IDS = 16
"""Sequences of one request that a line names."""
_MOST_PATH = 512
"""Characters of a path in a line."""


def log_access(notes: CallNotes) -> None:
    """Write the line of a request that has ended."""
    fields = access_fields(notes)
    text = "%s %s %s %s %.3f s"
    values = [fields[name] for name in ("client", "method", "path", "status", "seconds")]
    if notes.samples:
        text += ", %s+%s tokens, %s"
        reasons = " ".join(f"{name} {count}" for name, count in fields["finish_reasons"].items())
        values += [fields["prompt_tokens"], fields["output_tokens"], reasons or "cut off"]
    logger.info(text, *values, extra={"fields": fields})


def access_fields(notes: CallNotes) -> dict[str, Any]:
    """What is said of a request; times in seconds. Of sequences also their ids in the engine,
    their tokens, how they ended, and of the first how long it waited and when its first token came.
    """
    found: dict[str, Any] = {
        "client": notes.client or "-",
        "method": notes.method,
        "path": _shown(notes.path),
        "status": notes.status,
        "seconds": round(time.monotonic() - notes.began, 6),
    }
    if not notes.samples:
        return found
    ended = [sample for sample in notes.samples if sample.finish is not None]
    first = notes.samples[0]
    found |= {
        "rids": [sample.request.rid for sample in notes.samples[:_MOST_IDS]],
        "prompt_tokens": sum(len(sample.request.prompt_ids) for sample in notes.samples),
        "output_tokens": sum(sample.num_sent for sample in notes.samples),
        "finish_reasons": dict(Counter(s.finish.type for s in ended if s.finish is not None)),
    }
    if first.first_at:
        found["first_token_s"] = round(first.first_at - first.started_at, 6)
    if first.finish is not None:
        found["queue_s"] = round(first.output.queue_s, 6)
    return found


def _shown(path: str) -> str:
    """A path as it stands in a URL, where neither blanks nor line ends are."""
    more = "..." if len(path) > _MOST_PATH else ""
    return quote(path[:_MOST_PATH], safe="/:@!$&'()*+,;=~") + more
