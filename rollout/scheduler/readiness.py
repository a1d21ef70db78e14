"""Whether steps may run, and which commands may come: what is released, which update is open.

The ranks keep the memory and the weights; this is what the leader has to know of both, so that
no step is planned on memory that is not there, and a caller reads why in `ReplicaState`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import get_args

from engine.errors import InvalidRequest, MemoryReleased, UpdateOrder
from engine.protocol import AbortUpdate, BeginUpdate, MemoryTag, PauseMode
from engine.protocol.deadlines import capped
from rollout.scheduler.stats import SchedulerStats

ALL_TAGS: tuple[MemoryTag, ...] = get_args(MemoryTag)

UNDEFINED = (
    "the weights were released without a CPU backup, so the engine has none: publish a whole "
    "version (an update that is not partial)"
)


class Readiness:
    """Follows releases and updates as they succeed; refuses those that may not come.

    keeps_weights: released weights come back with their values. no_version: why the weights that
    were loaded may not serve, if so (`EngineConfig.refusal`).
    """

    def __init__(self, *, version: int, keeps_weights: bool, no_version: str = "") -> None:
        self._no_version = no_version
        self._keeps_weights = keeps_weights
        self._released: set[MemoryTag] = set()
        self._undefined = False
        self._broken = ""
        self._open: BeginUpdate | None = None
        self._deadline = 0.0
        self._committed = version
        self._groups: set[str] = set()

    @property
    def groups(self) -> list[str]:
        """Process groups that were joined and not left. One may have broken since; the command
        that next uses it says so."""
        return sorted(self._groups)

    @property
    def released(self) -> list[MemoryTag]:
        """Tags that are out, in the order in which they may be resumed."""
        return [tag for tag in ALL_TAGS if tag in self._released]

    @property
    def open_update(self) -> int | None:
        """Version of the update between its begin and its commit; None once it timed out."""
        if self._open is None or time.monotonic() > self._deadline:
            return None
        return self._open.version

    @property
    def hold(self) -> str:
        """Why requests have to wait, or "": a step would read memory that is not there, or
        weights of two versions."""
        if self._released:
            names = ", ".join(self.released)
            return f"released: {names}; resume in this order: {names}"
        if self.open_update is not None and self._writes_in_place:
            return f"the update to version {self.open_update} writes in place; commit or abort it"
        return UNDEFINED if self._undefined else ""

    @property
    def refusal(self) -> str:
        """Why no step may run, or "": `hold`, or the error of an update that died in place, or
        `no_version`."""
        return self.hold or self._broken or self._no_version

    @property
    def no_version(self) -> str:
        """Why requests are refused at once, or "": ranks hold unfinished weights, or the engine was
        started again and nothing whole was published since."""
        return self._broken or self._no_version

    @property
    def _writes_in_place(self) -> bool:
        return self._open is not None and self._open.mode in ("in_place", "undo")

    @property
    def written(self) -> AbortUpdate | None:
        """The abort of the update that writes into the live weights, if one does, whoever began
        it; also of one whose time is up."""
        if self._open is None or not self._writes_in_place:
            return None
        return AbortUpdate(version=self._open.version, owner=self._open.owner)

    @property
    def late_undo(self) -> AbortUpdate | None:
        """The same of an update that the ranks can undo, once its time is up: requests wait for
        nothing any more."""
        if self._open is None or self._open.mode != "undo" or self.open_update is not None:
            return None
        return self.written

    def check_release(
        self, tags: Iterable[MemoryTag], stats: SchedulerStats, *, pause: PauseMode | None = None
    ) -> None:
        """Raise unless `tags` may be released now, or once a `pause` has stopped generation:
        InvalidRequest while requests need them, UpdateOrder while an update writes weights, or one
        that timed out can still be undone."""
        asked = set(tags) - self._released
        late = self.late_undo
        version = self.open_update if late is None else late.version
        if "weights" in asked and version is not None:
            raise UpdateOrder(
                f"the update to version {version} is open; commit or abort it before releasing "
                "weights",
                field="version",
            )
        if not asked or stats.num_running == 0 or pause in ("abort", "retract"):
            return
        if "kv_cache" in asked:
            raise InvalidRequest(
                f"{stats.num_running} requests hold KV pages; wait for them, or pause with mode "
                "'retract' or 'abort', before releasing kv_cache",
                field="tags",
            )
        if not stats.paused and pause is None:
            raise InvalidRequest(
                f"{stats.num_running} requests are running; pause before releasing "
                f"{', '.join(sorted(asked))}",
                field="tags",
            )

    def release(self, tags: Iterable[MemoryTag]) -> None:
        """The ranks gave `tags` back."""
        self._released.update(tags)

    def resume(self, tags: Iterable[MemoryTag]) -> None:
        """The ranks have `tags` again."""
        back = self._released.intersection(tags)
        self._released -= back
        if "weights" in back and not self._keeps_weights:
            self._undefined = True

    def check_weights(self, what: str) -> None:
        """Raise MemoryReleased if there are no weights to read or write."""
        if "weights" in self._released:
            raise MemoryReleased(
                f"{what} needs the weights, which are released; resume 'weights' first",
                field="weights",
            )

    def check_reset(self) -> None:
        """Raise UpdateOrder if weights may not be overwritten, since an update is open."""
        if self.open_update is not None:
            raise UpdateOrder(
                f"the update to version {self.open_update} is open; commit or abort it before "
                "overwriting weights",
                field="version",
            )

    def is_open_for(self, command: AbortUpdate) -> bool:
        """Whether `command` aborts the update that is open, and may."""
        update = self._open
        if update is None:
            return False
        return (update.version, update.owner) == (command.version, command.owner)

    def check_begin(self, command: BeginUpdate, version: int) -> None:
        """Raise UpdateOrder for an update that would go back behind `version`, a name that was
        given to the weights that serve; the ranks know the versions committed."""
        if command.version <= version != self._committed:
            raise UpdateOrder(
                f"version {command.version} does not go forward: {version} serves now",
                field="version",
            )

    def joined(self, group: str) -> None:
        """The ranks are members of `group`."""
        self._groups.add(group)

    def left(self, group: str) -> None:
        """They are not."""
        self._groups.discard(group)

    def begun(self, command: BeginUpdate) -> None:
        """The update is open."""
        self._open = command
        self._deadline = time.monotonic() + capped(command.timeout_s)

    def prepared(self) -> None:
        """The open update was verified, and its time starts anew."""
        if self._open is not None:
            self._deadline = time.monotonic() + capped(self._open.timeout_s)

    def aborted(self) -> None:
        """No update is open."""
        self._open = None

    def committed(self, version: int, refusal: str) -> bool:
        """The commit to `version` succeeded; whether it was the first of this update.

        refusal: why the ranks refuse to step all the same, or "". They know what was torn: a
        partial update that brought all of that makes them whole. Only a whole one has a version,
        on an engine that was started again without one.
        """
        update, self._open = self._open, None
        if update is None:
            return False
        self._committed = version
        self._broken = refusal
        self._undefined = self._undefined and bool(refusal)
        if not update.partial:
            self._no_version = ""
        return True

    def died(self, message: str) -> None:
        """Ranks refuse to step, since they were left without whole weights."""
        self._broken = message
