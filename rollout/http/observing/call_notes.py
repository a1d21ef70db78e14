"""What is known of one HTTP request while it is handled, for the log and the trace of its end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from rollout.http.native.sample import Sample


@dataclass(eq=False, kw_only=True)
class CallNotes:
    """One request. began: by `time.monotonic`; began_ns: by `time.time_ns`. status: of the reply, 0
    before it. samples: its sequences, once they are about to be sampled."""

    request_id: str
    method: str
    path: str
    client: str
    began: float = field(default_factory=time.monotonic)
    began_ns: int = field(default_factory=time.time_ns)
    status: int = 0
    samples: Sequence[Sample] = ()


CALL: ContextVar[CallNotes | None] = ContextVar("call", default=None)
"""The request that the task handles: a generator is shared by all, and is not told of theirs."""


def note_samples(samples: Sequence[Sample]) -> None:
    """These sequences are of the request that this task handles, if it handles one."""
    notes = CALL.get()
    if notes is not None:
        notes.samples = samples
