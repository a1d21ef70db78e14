"""Signs of life of a spawned leader: a few numbers in a file that its owner maps too.

A leader that is busy answers nothing: a launch that builds kernels may keep it for minutes. So a
thread of its own counts up while the process runs at all, and its main thread notes what it has
begun and how long that may take. The owner, `ProcessReplica`, looks once in a while, and can
tell a leader that builds from one that hangs, and both from one that was stopped.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

from engine.protocol.deadlines import SILENT_S

_BEAT_S = 0.5
_LONGEST_LOOK_S = 5.0
"""Most time that counts between two looks: an owner that was stopped itself, or had other things
to do, has not seen a leader being silent."""
_SLOW_S = 1.0
"""What takes longer has its rows noted, in case that it never ends."""
_WARN = 4
"""A leader is late, and not yet lost, after this part of its deadline."""

_BEATS, _BEGUN, _WHAT, _LIMIT_MS = range(4)
_NUM_BYTES = 4 * 8


class Activity(IntEnum):
    """What a leader's main thread is doing."""

    WAITING = 0
    HOST = 1
    STEP = 2
    BUILD = 3
    COMMAND = 4


_NAMES = {
    Activity.WAITING: "waiting",
    Activity.HOST: "work between steps",
    Activity.STEP: "one step",
    Activity.BUILD: "a step that may build kernels and graphs",
    Activity.COMMAND: "one command",
}


class Pulse:
    """The leader's end. `start` begins to beat; `begin` is called by the main thread alone.
    on_slow: called by the thread that beats, once for whatever takes long."""

    def __init__(self, path: Path) -> None:
        self._words = _map(path)
        self._begun = 0
        self.on_slow: Callable[[], None] = lambda: None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def start(self) -> None:
        """Beat from now on, until `stop`."""
        self._words[_BEATS] += 1
        self._thread.start()

    def stop(self) -> None:
        """Beat no more; the leader is not watched from then on. Idempotent."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        self._words[_BEATS] = 0

    def begin(self, what: Activity, limit_s: float = 0.0) -> None:
        """The main thread does `what` now, which may take `limit_s`; 0.0: for ever."""
        words = self._words
        words[_WHAT] = what
        words[_LIMIT_MS] = int(limit_s * 1000)
        self._begun += 1
        words[_BEGUN] = self._begun

    def _beat(self) -> None:
        begun, since, told = -1, 0.0, True
        while not self._stopped.wait(_BEAT_S):
            self._words[_BEATS] += 1
            now = time.monotonic()
            if self._begun != begun:
                begun, since, told = self._begun, now, self._words[_WHAT] == Activity.WAITING
            elif not told and now - since > _SLOW_S:
                told = True
                self.on_slow()


class PulseWatch:
    """The owner's end. `look` is called every second or so, with the time of `time.monotonic`.

    silent_s: how long a leader may give no sign of life.
    """

    def __init__(self, path: Path, *, silent_s: float = SILENT_S) -> None:
        self._words = _map(path)
        self._limit_s = silent_s
        self._looked_at = time.monotonic()
        self._seen = (0, 0)
        self._silent_s = self._busy_s = 0.0
        self._told = -1

    def look(self, now: float) -> str:
        """Why the leader has to be given up; "" while it does not."""
        spent_s = min(now - self._looked_at, _LONGEST_LOOK_S)
        self._looked_at = now
        beats, begun = seen = self._words[_BEATS], self._words[_BEGUN]
        old, self._seen = self._seen, seen
        self._silent_s = self._silent_s + spent_s if beats and beats == old[0] else 0.0
        self._busy_s = self._busy_s + spent_s if beats and begun == old[1] else 0.0
        return self._judge(1)

    def stuck(self, limit_s: float) -> str:
        """What has taken longer than `limit_s`, as of the last look; "" if nothing has, and for
        what was told before."""
        _, begun = self._seen
        working = self._words[_WHAT] != Activity.WAITING and self._busy_s > limit_s
        if begun == self._told or not (working or self._silent_s > limit_s):
            return ""
        self._told = begun
        what = _NAMES[Activity(self._words[_WHAT])]
        return f"has been at {what} for {max(self._busy_s, self._silent_s):.0f} s"

    @property
    def late(self) -> str:
        """What takes unusually long, as of the last look; "" if nothing does."""
        return self._judge(_WARN)

    def _judge(self, part: int) -> str:
        if self._silent_s > self._limit_s / part:
            return f"gave no sign of life for {self._silent_s:.0f} s: it was stopped, or hangs"
        what, limit_s = Activity(self._words[_WHAT]), self._words[_LIMIT_MS] / 1000
        if what in (Activity.HOST, Activity.STEP):
            limit_s /= part
        if limit_s and self._busy_s > limit_s:
            return f"has been at {_NAMES[what]} for {self._busy_s:.0f} s"
        return ""


def pulse_path(folder: Path) -> Path:
    """The file's place in the folder that a leader and its owner share."""
    return folder / "pulse"


def _map(path: Path) -> memoryview:
    """The numbers of the file, which is made if it is not there."""
    with path.open("a+b") as file:
        file.truncate(_NUM_BYTES)
        return memoryview(mmap.mmap(file.fileno(), _NUM_BYTES)).cast("q")
