"""The weight update that is open, whoever opened it.

Explicit: its caller opened it and ends it. Implicit: the first tensors of a caller that knows
no sessions opened it. A bucket is no commit: while generation stands still (paused, or its
memory released) an implicit update gathers until the resume, which commits it; while requests
run, a call that says it is the last ends it. Either way it is committed only if it covers the
model or its caller said that it is partial, and is dropped otherwise, so that a trainer that
died between two buckets leaves the version that serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator

from engine.errors import (
    EngineDead,
    InvalidRequest,
    ManifestMismatch,
    SlipstreamError,
    UpdateOrder,
)
from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    CommitUpdate,
    GetState,
    LoadFromDisk,
    PrepareUpdate,
    ReplicaState,
    Reply,
    SetVersion,
    UpdateReport,
)
from rollout.http.engine.client import AsyncEngine
from rollout.http.updates.open_update import (
    Feed,
    OpenUpdate,
    UpdateCommand,
    begun_again,
    origin_of,
    require_ours,
)
from rollout.http.updates.transfers import Transfers
from rollout.http.updates.version_labels import VersionLabels
from rollout.metrics import Metrics

logger = logging.getLogger(__name__)

_ENDS = (PrepareUpdate, CommitUpdate, AbortUpdate)


class Updates:
    """Runs the commands of updates one at a time; nothing else waits for them, and an abort
    does not wait either.

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
        self._metrics = metrics
        self._stands_still = stands_still
        self._lock = asyncio.Lock()
        self._transfers = Transfers(engine)
        self._update: OpenUpdate | None = None
        self._failure: SlipstreamError | None = None
        self._needs_whole = False

    @property
    def is_open(self) -> bool:
        """Whether an update is open."""
        return self._update is not None

    def weights_lost(self) -> None:
        """The engine has no weights: the next update that is committed is a whole one."""
        self._needs_whole = True

    def reset(self, *, weights_lost: bool = False) -> None:
        """Forget everything: the engine is a new one. Called by the owner of its process, once
        every call to the old one has failed. weights_lost: only a whole update serves again."""
        self._lock = asyncio.Lock()
        self._transfers = Transfers(self._engine)
        self._update = self._failure = None
        self._needs_whole = weights_lost

    async def quiet(self, what: str) -> None:
        """See `Transfers.quiet`."""
        await self._transfers.quiet(what)

    async def abandon(self, command: Feed) -> None:
        """The caller of `command`, which has not ended, has left: abort the update it feeds, or
        have it refused if its turn has not come."""
        if not self._transfers.abandon(command) and self._update is not None:
            await self._abort_now(
                AbortUpdate(version=self._update.version, owner=self._update.owner)
            )

    async def begin(self, label: str | None, *, partial: bool) -> int:
        """Open an explicit update; its version. Begun again before anything came, it is the
        same update. Raises UpdateOrder."""
        await self.quiet("the begin of an update")
        async with self._lock:
            open_one = await self._alive_explicit()
            if open_one is not None:
                return begun_again(open_one)
            await self._settle()
            return (await self._open(label, partial=partial, explicit=True)).version

    async def feed(
        self, command: Feed, label: str | None, *, last: bool, partial: bool, peer: str = ""
    ) -> UpdateReport | None:
        """Feed the open update, or an implicit one opened here; the report if it was committed.

        last: nothing follows. partial: the update leaves the tensors that do not come as they
        are, which its first call has to say. A label other than that of the implicit update
        that is open belongs to another update. peer: the caller's address. Tensors that come to
        an implicit update another way than its first ones are another trainer's (UpdateOrder).
        """
        async with self._lock:
            self._transfers.refuse_abandoned(command)
            still = await self._is_still()
            self._refuse_after_failure(over=last and not still)
            update = await self._update_of(label, partial, origin_of(command, peer))
            rest_follows = still or not last
            async with self._dropped_on_error(update, rest_follows=rest_follows):
                await self._transfers.run(command, owner=update.owner)
                update.num_feeds += 1
            if update.explicit or not last or await self._is_still():
                return None
            return await self._commit(update)

    async def commit(self, label: str | None) -> UpdateReport:
        """End the open update. Raises UpdateOrder without one."""
        async with self._lock:
            if self._update is None:
                why = "" if self._failure is None else f" ({self._failure})"
                raise UpdateOrder(f"no update is open{why}; begin one first", field="update")
            require_ours(self._update)
            if label is not None:
                self._update.label = label
            return await self._commit(self._update)

    async def load(self, path: str, label: str | None, *, partial: bool) -> UpdateReport:
        """One update from a folder, committed at once; a caller's open update is left to its
        caller."""
        await self.quiet("an update from a folder")
        async with self._lock:
            open_one = await self._alive_explicit()
            if open_one is not None:
                raise UpdateOrder(
                    f"update {open_one.version} is open; end it first", field="update"
                )
            await self._settle()
            update = await self._open(label, partial=partial, explicit=False)
            async with self._dropped_on_error(update, rest_follows=False):
                load = LoadFromDisk(path=path, partial=partial)
                await self._transfers.run(load, owner=update.owner)
            return await self._commit(update)

    async def set_version(self, label: str) -> int:
        """Call the weights that serve `label`; the version that stands for it. A label that
        they have already changes nothing."""
        await self.quiet("a new name of the version")
        async with self._lock:
            current = (await self._state()).version
            if self._labels.text(current) == label:
                return current
            version = self._labels.reserve(label, current)
            with self._named(version, label):
                await self._engine.send(SetVersion(version=version))
            return version

    async def settle(self) -> str:
        """Before a pause: commit an implicit update that covers the model, drop any other. What
        was dropped and why, or ""; an update that is being received right now is left alone."""
        if self._lock.locked():
            return ""
        async with self._lock:
            return await self._settle()

    async def finish(self) -> str:
        """Before a resume: commit an implicit update. Raises what its commit raised; it is
        dropped then, and a second resume goes on with what serves. Does not wait for tensors
        that are being received right now: the text then says that they are not committed."""
        if self._lock.locked():
            return "; an update is being received, and is not committed by this"
        async with self._lock:
            self._failure = None
            if self._update is not None and not self._update.explicit:
                await self._commit(self._update)
            return ""

    async def flushed(self) -> None:
        """Before a flush of the cache: who sent buckets with `flush_cache` false while requests
        run, and flushes now, has sent them all. An implicit update that does not cover the
        model stays open."""
        if self._lock.locked():
            return
        async with self._lock:
            update = self._update
            if update is None or update.explicit or await self._is_still():
                return
            try:
                prepare = PrepareUpdate(version=update.version, owner=update.owner)
                await self._engine.send(prepare)
            except EngineDead:
                raise
            except SlipstreamError as error:
                logger.info("update %d is not complete at a flush: %s", update.version, error)
                return
            await self._commit(update)

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
                await self._make_room(command)
            try:
                reply = await self._transfers.run(command)
            except EngineDead:
                raise
            except SlipstreamError:
                await self._note_failure(command)
                raise
            self._note(command, reply)
            return reply

    async def _abort_now(self, command: AbortUpdate) -> Reply:
        try:
            reply = await self._engine.send(command)
        except EngineDead:
            raise
        except SlipstreamError:
            await self._note_failure(command)
            raise
        if self._update is not None and self._update.version == command.version:
            self._ended(None)
        return reply

    async def _make_room(self, begin: BeginUpdate) -> None:
        open_one = self._update
        if open_one is None or not open_one.explicit:
            await self._settle()
        elif open_one.failed and open_one.version != begin.version:
            await self._abort(open_one)

    def _note(self, command: UpdateCommand, reply: Reply) -> None:
        match command:
            case BeginUpdate():
                self._failure = None
                self._update = OpenUpdate(
                    version=command.version,
                    explicit=True,
                    partial=command.partial,
                    owner=command.owner,
                    foreign=True,
                )
            case CommitUpdate():
                self._labels.name(command.version, None)
                self._ended(reply.report)
            case _ if self._update is not None:
                self._update.failed = False
                self._update.num_feeds += not isinstance(command, PrepareUpdate)

    async def _note_failure(self, command: UpdateCommand) -> None:
        """The engine drops an update whose transfer broke, and keeps one that may go on. A
        command of another update says nothing about the one that is open."""
        if self._update is None or isinstance(command, BeginUpdate):
            return
        if command.owner != self._update.owner:
            return
        version = self._update.version
        names = command.version if isinstance(command, _ENDS) else version
        if names != version:
            return
        self._update.failed = True
        if (await self._state()).open_update != self._update.version:
            self._update = None

    async def _alive_explicit(self) -> OpenUpdate | None:
        """The explicit update that is open. One that failed is dropped, and one that the engine
        dropped, since its time was up, is forgotten."""
        update = self._update
        if update is None or not update.explicit:
            return None
        if update.failed:
            await self._abort(update)
        elif (await self._state()).open_update != update.version:
            self._update = None
        return self._update

    async def _update_of(
        self, label: str | None, partial: bool, origin: tuple[str, ...]
    ) -> OpenUpdate:
        """The update that a call with this label feeds, whose tensors come by `origin`."""
        update = self._update
        if update is not None and update.explicit and update.failed:
            await self._abort(update)
            update = None
        is_other = update is not None and not update.explicit and update.origin != origin
        if is_other and (await self._state()).open_update is None:
            # Its time is up.
            self._update = update = None
        if update is None:
            return await self._open(label, partial=partial, explicit=False, origin=origin)
        require_ours(update)
        known = update.label
        if not update.explicit and label is not None and known is not None and label != known:
            await self._settle()
            return await self._open(label, partial=partial, explicit=False, origin=origin)
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

    async def _open(
        self,
        label: str | None,
        *,
        partial: bool,
        explicit: bool,
        origin: tuple[str, ...] = (),
    ) -> OpenUpdate:
        state = await self._state()
        version = self._labels.reserve(label, state.version)
        died = bool(state.refusal) and not state.released
        partial = partial and not (self._needs_whole or died)
        owner = uuid.uuid4().hex
        await self._engine.send(BeginUpdate(version=version, partial=partial, owner=owner))
        self._failure = None
        self._update = OpenUpdate(
            version=version,
            explicit=explicit,
            partial=partial,
            label=label,
            owner=owner,
            origin=origin,
        )
        return self._update

    async def _settle(self) -> str:
        """Commit the implicit update if it covers the model, else drop it and say why."""
        self._failure = None
        update = self._update
        if update is None or update.explicit:
            return ""
        why = "its caller called it partial and did not end it"
        if update.partial:
            await self._abort(update)
        else:
            try:
                await self._commit(update)
                return ""
            except EngineDead:
                raise
            except SlipstreamError as error:
                why = error.message
        dropped = f"update {update.version}, which nobody ended, was dropped: {why}"
        logger.warning("%s", dropped)
        return f"; {dropped}"

    async def _commit(self, update: OpenUpdate) -> UpdateReport:
        try:
            async with self._dropped_on_error(update, rest_follows=False):
                with self._named(update.version, update.label):
                    commit = CommitUpdate(version=update.version, owner=update.owner)
                    reply = await self._engine.send(commit)
        except ManifestMismatch as error:
            if update.explicit or update.partial:
                raise
            refusal = (await self._state()).refusal
            if refusal:
                raise ManifestMismatch(
                    f"update {update.version} was not committed, and nothing serves ({refusal}): "
                    f"{error.message}. Send the whole model: no partial update is taken until then",
                    field=error.field,
                ) from error
            raise ManifestMismatch(
                f"update {update.version} was not committed, and what served before serves: "
                f"{error.message}. Send the whole model before the resume, or, while requests "
                "run, before the call with flush_cache; or say partial in every call",
                field=error.field,
            ) from error
        self._ended(reply.report)
        assert reply.report is not None, "a commit reports what it moved"
        return reply.report

    @contextlib.contextmanager
    def _named(self, version: int, label: str | None) -> Iterator[None]:
        """Call `version` by `label` before its first token can come, unless it never serves."""
        self._labels.name(version, label)
        done = False
        try:
            yield
            done = True
        finally:
            if not done:
                self._labels.name(version, None)

    def _ended(self, report: UpdateReport | None) -> None:
        update, self._update = self._update, None
        if update is not None and report is not None:
            self._metrics.updated(time.monotonic() - update.began_at)
            self._needs_whole = self._needs_whole and update.partial

    async def _abort(self, update: OpenUpdate) -> None:
        self._update = None
        with contextlib.suppress(SlipstreamError):
            # Often the engine has dropped it by itself.
            abort = AbortUpdate(version=update.version, owner=update.owner)
            await self._engine.send(abort)

    @contextlib.asynccontextmanager
    async def _dropped_on_error(
        self, update: OpenUpdate, *, rest_follows: bool
    ) -> AsyncIterator[None]:
        """Abort the update if what is inside fails. rest_follows: parts may come that are no
        whole without what was dropped, and have to be refused."""
        try:
            yield
        except SlipstreamError as error:
            if rest_follows and not update.explicit:
                self._failure = error
            await self._abort(update)
            raise

    def _refuse_after_failure(self, *, over: bool) -> None:
        """over: this call was the last of its update, so that the next one starts anew."""
        failure = self._failure
        if failure is None:
            return
        if over:
            self._failure = None
        raise UpdateOrder(
            f"an earlier part of this update failed ({failure}); begin again by a pause or a begin",
            field="update",
        )

    async def _is_still(self) -> bool:
        state = await self._state()
        return state.paused or bool(state.released) or self._stands_still()

    async def _state(self) -> ReplicaState:
        reply = await self._engine.send(GetState())
        assert reply.state is not None
        return reply.state
