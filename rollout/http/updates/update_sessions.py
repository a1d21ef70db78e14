"""Commands of weight updates, one at a time, from callers with sessions and without.

Explicit: its caller opened it and ends it. Implicit: the first tensors of a caller that knows
no sessions opened it. A bucket is no commit: while generation stands still (paused, or its
memory released) an implicit update gathers until the resume, which commits it; while requests
run, a call that says it is the last ends it. Either way it is committed only if it covers the
model or its caller said that it is partial, and is dropped otherwise, so that a trainer that
died between two buckets leaves the version that serves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from engine.errors import (
    EngineDead,
    InvalidRequest,
    SlipstreamError,
    UpdateOrder,
)
from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    LoadFromDisk,
    PrepareUpdate,
    Reply,
    SetVersion,
    UpdateReport,
)
from rollout.http.engine.client import AsyncEngine
from rollout.http.updates.current_update import CurrentUpdate
from rollout.http.updates.operations import Operations, as_a_whole
from rollout.http.updates.tracked_update import (
    EndingCall,
    Feed,
    Gathered,
    TrackedUpdate,
    UpdateCommand,
    begun_again,
    origin_of,
    require_ours,
)
from rollout.http.updates.transfers import Transfers
from rollout.http.updates.version_labels import VersionLabels
from rollout.metrics import Metrics

logger = logging.getLogger(__name__)


class Updates:
    """Runs the commands of updates one at a time; nothing else waits for them, and an abort
    does not wait either. What was begun ends as a whole, also when its caller is cancelled.

    Every method raises the engine's typed error. What failed leaves no implicit update open,
    and the engine serves what it served before, or refuses and says why.

    stands_still: whether a pause is on its way that `ReplicaState` does not show yet.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        labels: VersionLabels,
        metrics: Metrics,
        *,
        stands_still: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._labels = labels
        self._stands_still = stands_still
        self.operations = Operations()
        self._lock = asyncio.Lock()
        self._transfers = Transfers(engine)
        self._current = CurrentUpdate(engine, labels, metrics)

    def weights_lost(self) -> None:
        """The engine has no weights: the next update that is committed is a whole one."""
        self._current.needs_whole = True

    def reset(self, *, weights_lost: bool = False) -> None:
        """Forget everything: the engine is a new one. Called by the owner of its process, once
        every call to the old one has failed. weights_lost: only a whole update serves again."""
        self._lock = asyncio.Lock()
        self._transfers = Transfers(self._engine)
        self._current.reset(needs_whole=weights_lost)

    async def quiet(self, what: str) -> None:
        """See `Transfers.quiet`."""
        await self._transfers.quiet(what)

    @as_a_whole
    async def abandon(self, command: Feed) -> None:
        """The caller of `command`, which has not ended, has left: abort the update it feeds, or
        have it refused if its turn has not come."""
        if not self._transfers.abandon(command) and self._current.update is not None:
            await self._abort_now(
                AbortUpdate(version=self._current.update.version, owner=self._current.update.owner)
            )

    @as_a_whole
    async def begin(self, label: str | None = None, *, partial: bool = True) -> int:
        """Open an explicit update; its version. Begun again before anything came, it is the
        same update. Raises UpdateOrder."""
        await self.quiet("the begin of an update")
        async with self._lock:
            open_one = await self._current.alive_explicit()
            if open_one is not None:
                return begun_again(open_one)
            await self._current.refuse_waiting()
            await self._current.settle()
            return (await self._current.open(label, partial=partial, explicit=True)).version

    @as_a_whole
    async def feed(
        self,
        command: Feed,
        label: str | None = None,
        *,
        last: bool = False,
        partial: bool = False,
        peer: str = "",
        hold: bool = False,
    ) -> UpdateReport | None:
        """Feed the open update, or an implicit one opened here; the report if it was committed.

        last: nothing follows. partial: the update leaves the tensors that do not come as they
        are, which its first call has to say. A label other than that of the implicit update
        that is open belongs to another update. peer: the caller's address. Tensors that come to
        an implicit update another way than its first ones are another trainer's (UpdateOrder).
        hold: it is verified in place of being committed, and stays open.
        """
        async with self._lock:
            self._transfers.refuse_abandoned(command)
            still = await self._is_still()
            self._current.refuse_after_failure(over=last and not still)
            update = await self._update_of(label, partial, origin_of(command, peer))
            rest_follows = still or not last
            async with self._current.dropped_on_error(update, rest_follows=rest_follows):
                await self._transfers.run(command, owner=update.owner)
                update.num_feeds += 1
            if update.explicit or not last or await self._is_still():
                return None
            return await self._end(update, hold=hold)

    @as_a_whole
    async def commit(self, label: str | None = None) -> UpdateReport:
        """End the open update. Raises UpdateOrder without one."""
        async with self._lock:
            if self._current.update is None:
                why = "" if self._current.failure is None else f" ({self._current.failure})"
                raise UpdateOrder(f"no update is open{why}; begin one first", field="update")
            require_ours(self._current.update)
            if label is not None:
                self._current.update.label = label
            return await self._current.commit(self._current.update)

    @as_a_whole
    async def load(
        self, path: str, label: str | None = None, *, partial: bool = False, hold: bool = False
    ) -> UpdateReport | None:
        """One update from a folder, committed at once; with `hold` it is verified, and stays open.
        Raises UpdateOrder while a caller's own update is open, which is left to its caller."""
        await self.quiet("an update from a folder")
        async with self._lock:
            open_one = await self._current.alive_explicit()
            if open_one is not None:
                raise UpdateOrder(
                    f"update {open_one.version} is open; end it first", field="update"
                )
            await self._current.refuse_waiting()
            await self._current.settle()
            update = await self._current.open(label, partial=partial, explicit=False)
            async with self._current.dropped_on_error(update, rest_follows=False):
                load = LoadFromDisk(path=path, partial=partial)
                await self._transfers.run(load, owner=update.owner)
                update.num_feeds += 1
            return await self._end(update, hold=hold)

    @as_a_whole
    async def prepare(self, *, held: bool = False, explicit: bool = False) -> int | None:
        """Verify the update that is open, as its commit will; its version, None without one, or
        while its tensors come. held: only one that was verified in place of being committed.
        explicit: also one that its caller ends. Raises what its commit would be refused with: it is
        dropped then."""
        if self._lock.locked():
            return None
        async with self._lock:
            update = self._current.update
            if update is None or not update.num_feeds or update.foreign:
                return None
            if (held and not update.held) or (update.explicit and not explicit):
                return None
            if not update.held:
                await self._end(update, hold=True)
                update.held = False
            return update.version

    @as_a_whole
    async def prepare_before(self, call: EndingCall) -> Gathered | None:
        """Verify the implicit update that `call` will commit; None where it commits none. One that
        is not whole, and which `call` leaves or drops, stays open."""
        if self._lock.locked():
            return None
        async with self._lock:
            update = self._current.update
            if update is None or update.explicit or update.waits or not update.num_feeds:
                return None
            if call == "flush" and await self._is_still():
                return None
            if call == "pause" and update.partial:
                return Gathered(update.version, "its caller called it partial and did not end it")
            return Gathered(update.version, await self._missing(update))

    @as_a_whole
    async def commit_version(self, version: int) -> int:
        """Commit the open update of that version; nothing, if it serves already. Raises
        UpdateOrder if it is neither."""
        async with self._lock:
            update = self._current.update
            if update is not None and update.version == version:
                await self._current.commit(update)
            elif (serving := (await self._current.state()).version) != version:
                raise UpdateOrder(
                    f"version {version} is not open here, and {serving} serves", field="version"
                )
            return version

    @as_a_whole
    async def drop_version(self, version: int) -> None:
        """Abort the open update of that version, if it is open."""
        async with self._lock:
            update = self._current.update
            if update is not None and update.version == version:
                await self._current.abort(update)

    @as_a_whole
    async def set_version(self, label: str) -> int:
        """Call the weights that serve `label`; the version that stands for it. A label that
        they have already changes nothing."""
        await self.quiet("a new name of the version")
        async with self._lock:
            current = (await self._current.state()).version
            if self._labels.text(current) == label:
                return current
            version = self._labels.reserve(label, current)
            with self._current.named(version, label):
                await self._engine.send(SetVersion(version=version))
            return version

    @as_a_whole
    async def settle(self) -> str:
        """Before a pause: commit an implicit update that covers the model, drop any other. What
        was dropped and why, or ""; an update that is being received right now is left alone."""
        if self._lock.locked():
            return ""
        async with self._lock:
            return await self._current.settle()

    async def finish(self) -> str:
        """Before a resume: commit an implicit update. Raises what its commit raised; it is
        dropped then, and a second resume goes on with what serves. Does not wait for tensors
        that are being received right now: the text then says that they are not committed."""
        if self._lock.locked():
            return "; an update is being received, and is not committed by this"
        async with self._lock:
            self._current.failure = None
            update = self._current.update
            if update is not None and not update.explicit and not update.waits:
                await self._current.commit(update)
            return ""

    @as_a_whole
    async def flushed(self) -> None:
        """Before a flush of the cache: who sent buckets with `flush_cache` false while requests
        run, and flushes now, has sent them all. An implicit update that does not cover the
        model stays open."""
        if self._lock.locked():
            return
        async with self._lock:
            update = self._current.update
            if update is None or update.explicit or update.waits or await self._is_still():
                return
            if missing := await self._missing(update):
                logger.info("update %d is not complete at a flush: %s", update.version, missing)
                return
            await self._current.commit(update)

    @as_a_whole
    async def forward(self, command: UpdateCommand) -> Reply:
        """Run a command of a caller that speaks the protocol itself, keeping track of what it
        opens and ends. An abort goes to the engine at once: it ends what is being received, and
        whoever holds the lock meanwhile learns it by the error of that."""
        if isinstance(command, AbortUpdate):
            return await self._abort_now(command)
        if isinstance(command, BeginUpdate):
            await self.quiet("the begin of an update")
        async with self._lock:
            self._transfers.refuse_abandoned(command)
            if isinstance(command, BeginUpdate):
                await self._current.make_room(command)
            try:
                reply = await self._transfers.run(command)
            except EngineDead:
                raise
            except SlipstreamError:
                await self._current.note_failure(command)
                raise
            self._current.note(command, reply)
            return reply

    async def _missing(self, update: TrackedUpdate) -> str:
        """Why an update cannot be committed yet, or "" for one that was verified."""
        try:
            await self._engine.send(PrepareUpdate(version=update.version, owner=update.owner))
        except EngineDead:
            raise
        except SlipstreamError as error:
            return error.message
        return ""

    async def _end(self, update: TrackedUpdate, *, hold: bool) -> UpdateReport | None:
        """Commit an update whose last tensors came, or with `hold` verify it."""
        if not hold:
            return await self._current.commit(update)
        update.held, update.held_at = True, time.monotonic()
        async with self._current.dropped_on_error(update, rest_follows=False):
            prepare = PrepareUpdate(version=update.version, owner=update.owner)
            await self._engine.send(prepare)
        return None

    async def _abort_now(self, command: AbortUpdate) -> Reply:
        try:
            reply = await self._engine.send(command)
        except EngineDead:
            raise
        except SlipstreamError:
            await self._current.note_failure(command)
            raise
        if self._current.update is not None and self._current.update.version == command.version:
            self._current.ended(None)
        return reply

    async def _update_of(
        self, label: str | None, partial: bool, origin: tuple[str, ...]
    ) -> TrackedUpdate:
        """The update that a call with this label feeds, whose tensors come by `origin`."""
        await self._current.refuse_waiting()
        update = self._current.update
        if update is not None and update.explicit and update.failed:
            await self._current.abort(update)
            update = None
        is_other = update is not None and not update.explicit and update.origin != origin
        if is_other and (await self._current.state()).open_update is None:
            # Its time is up.
            self._current.update = update = None
        if update is None:
            return await self._current.open(label, partial=partial, explicit=False, origin=origin)
        require_ours(update)
        known = update.label
        if not update.explicit and label is not None and known is not None and label != known:
            await self._current.settle()
            return await self._current.open(label, partial=partial, explicit=False, origin=origin)
        if not update.explicit and update.origin != origin:
            raise UpdateOrder(
                f"update {update.version} is open, and its tensors come by "
                f"{' '.join(update.origin)}, not {' '.join(origin)}: it is another trainer's. "
                "Its resume or pause ends it; if that trainer is gone, pause again",
                field="update",
            )
        if partial and not update.partial and not update.explicit:
            raise InvalidRequest(
                f"update {update.version} was begun as a whole one; say partial in its first call",
                field="partial",
            )
        update.label = known if label is None else label
        return update

    async def _is_still(self) -> bool:
        state = await self._current.state()
        return state.paused or bool(state.released) or self._stands_still()
