"""What happened to a server's weights and to its work, from the commands that the engine answered.

Whoever sends them, by whichever dialect: each command passes the one `AsyncEngine` of the server,
which tells this of its reply.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    Command,
    CommitUpdate,
    MemoryTag,
    Pause,
    ReleaseMemory,
    Reply,
    Resume,
    ResumeMemory,
    SetVersion,
)
from rollout.dashboard.figures import Event, EventKind, EventsPage
from rollout.dashboard.ring import Ring

_KEPT = 2000
_PAGE = 1000
_MOST_CHARS = 500
_Named = BeginUpdate | CommitUpdate | AbortUpdate | Pause | Resume | ReleaseMemory | ResumeMemory


class Timeline:
    """The last events. version: what a version is called. clock: Unix seconds."""

    def __init__(
        self, version: Callable[[int], str], clock: Callable[[], float] = time.time
    ) -> None:
        self._version = version
        self._clock = clock
        self._events: Ring[Event] = Ring(_KEPT)
        self._began: float | None = None
        self._stopped: float | None = None

    def page(self, since: int) -> EventsPage:
        """Events from a cursor on."""
        first, events = self._events.since(since, _PAGE)
        behind = first + len(events)
        return EventsPage(first=first, next=behind, events=events, more=behind < self._events.next)

    def restarted(self) -> None:
        """Another engine has taken over."""
        self._began = self._stopped = None
        self._add("note", "the engine was started again")

    def note(self, command: Command, reply: Reply) -> None:
        """One command, answered."""
        if reply.error is not None:
            if isinstance(command, _Named):
                self._add("error", f"{_WORDS[type(command)]} failed: {reply.error.message}")
            return
        match command:
            case BeginUpdate():
                self._began = self._clock()
            case CommitUpdate():
                self._committed(command, reply)
            case AbortUpdate():
                text = f"the update to version {command.version} was dropped"
                self._add("update", text, since=self._began)
                self._began = None
            case SetVersion():
                name = self._version(command.version)
                self._add("version", f"the weights are called version {name}", version=name)
            case _:
                self._note_work(command)

    def _note_work(self, command: Command) -> None:
        match command:
            case Pause():
                if self._stopped is None:
                    self._stopped = self._clock()
                    self._add("pause", f"paused ({command.mode})")
            case Resume():
                if self._stopped is not None:
                    self._add("resume", "generation goes on", since=self._stopped)
                self._stopped = None
            case ReleaseMemory():
                self._add("sleep", f"released {_tags(command.tags)}")
            case ResumeMemory():
                self._add("wake", f"took back {_tags(command.tags)}")

    def _committed(self, command: CommitUpdate, reply: Reply) -> None:
        name = self._version(command.version)
        moved = ""
        if reply.report is not None:
            moved = f": {reply.report.num_tensors} tensors, {_bytes(reply.report.num_bytes)}"
        self._add("version", f"version {name}{moved}", since=self._began, version=name)
        self._began = None

    def _add(
        self, kind: EventKind, text: str, *, since: float | None = None, version: str = ""
    ) -> None:
        now = self._clock()
        took = None if since is None else max(0.0, now - since)
        text, version = _cut(text), _cut(version)
        self._events.add(Event(at=now, x=now, kind=kind, text=text, seconds=took, version=version))


_WORDS: dict[type, str] = {
    BeginUpdate: "the begin of an update",
    CommitUpdate: "the commit of an update",
    AbortUpdate: "the end of an update",
    Pause: "a pause",
    Resume: "a resume",
    ReleaseMemory: "a release of memory",
    ResumeMemory: "taking memory back",
}


def _cut(text: str) -> str:
    """A text that may quote what was sent, which is kept for long."""
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]}..."


def _tags(tags: list[MemoryTag]) -> str:
    return ", ".join(tags) or "all memory"


def _bytes(count: int) -> str:
    """A count of bytes in the unit that makes it readable."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
