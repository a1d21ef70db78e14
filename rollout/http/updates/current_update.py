"""The one update that may be open, from its begin to its commit or its end in any other way."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterator

from engine.errors import EngineDead, ManifestMismatch, SlipstreamError, UpdateOrder
from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    CommitUpdate,
    GetState,
    PrepareUpdate,
    ReplicaState,
    Reply,
    UpdateReport,
)
from rollout.http.engine.client import AsyncEngine
from rollout.http.updates.tracked_update import TrackedUpdate, UpdateCommand
from rollout.http.updates.version_labels import VersionLabels
from rollout.metrics import Metrics

logger = logging.getLogger(__name__)

_ENDS = (PrepareUpdate, CommitUpdate, AbortUpdate)


class CurrentUpdate:
    """Begins, commits and drops updates for `Updates`, which calls it with its lock held.

    update: the one that is open. failure: what an implicit update broke with of which more parts
    may come. needs_whole: whether only an update of the whole model serves again.
    """

    def __init__(self, engine: AsyncEngine, labels: VersionLabels, metrics: Metrics) -> None:
        self._engine = engine
        self._labels = labels
        self._metrics = metrics
        self.update: TrackedUpdate | None = None
        self.failure: SlipstreamError | None = None
        self.needs_whole = False

    def reset(self, *, needs_whole: bool) -> None:
        """Forget the open update: the engine is a new one."""
        self.update = self.failure = None
        self.needs_whole = needs_whole

    async def state(self) -> ReplicaState:
        """What the engine says of itself now."""
        reply = await self._engine.send(GetState())
        assert reply.state is not None
        return reply.state

    async def open(
        self,
        label: str | None,
        *,
        partial: bool,
        explicit: bool,
        origin: tuple[str, ...] = (),
    ) -> TrackedUpdate:
        """Begin an update, for which no other may be open. One that leaves out tensors is begun
        as a whole one where only a whole one may serve. Raises the engine's typed error."""
        state = await self.state()
        version = self._labels.reserve(label, state.version)
        died = bool(state.refusal) and not state.released
        partial = partial and not (self.needs_whole or died)
        owner = uuid.uuid4().hex
        await self._engine.send(BeginUpdate(version=version, partial=partial, owner=owner))
        self.failure = None
        self.update = TrackedUpdate(
            version=version,
            explicit=explicit,
            partial=partial,
            label=label,
            owner=owner,
            origin=origin,
        )
        return self.update

    async def commit(self, update: TrackedUpdate) -> UpdateReport:
        """Commit the open update. Raises the engine's typed error: the update is dropped then;
        for an implicit one that does not cover the model it says what its caller may do."""
        try:
            async with self.dropped_on_error(update, rest_follows=False):
                with self.named(update.version, update.label):
                    commit = CommitUpdate(version=update.version, owner=update.owner)
                    reply = await self._engine.send(commit)
        except ManifestMismatch as error:
            if update.explicit or update.partial:
                raise
            refusal = (await self.state()).refusal
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
        self.ended(reply.report)
        assert reply.report is not None, "a commit reports what it moved"
        return reply.report

    async def abort(self, update: TrackedUpdate) -> None:
        """Drop the open update."""
        self.update = None
        with contextlib.suppress(SlipstreamError):
            # Often the engine has dropped it by itself.
            abort = AbortUpdate(version=update.version, owner=update.owner)
            await self._engine.send(abort)

    async def alive_explicit(self) -> TrackedUpdate | None:
        """The explicit update that is open. One that failed is dropped, and one that the engine
        dropped, since its time was up, is forgotten."""
        update = self.update
        if update is None or not update.explicit:
            return None
        if update.failed:
            await self.abort(update)
        elif (await self.state()).open_update != update.version:
            self.update = None
        return self.update

    async def settle(self) -> str:
        """Commit the implicit update if it covers the model, else drop it and say why."""
        self.failure = None
        update = self.update
        if update is None or update.explicit or update.waits:
            return ""
        why = "its caller called it partial and did not end it"
        if update.partial:
            await self.abort(update)
        else:
            try:
                await self.commit(update)
                return ""
            except EngineDead:
                raise
            except SlipstreamError as error:
                why = error.message
        dropped = f"update {update.version}, which nobody ended, was dropped: {why}"
        logger.warning("%s", dropped)
        return f"; {dropped}"

    async def refuse_waiting(self) -> None:
        """Raise UpdateOrder for another update while one was verified for a router, which has not
        said yet whether it serves: two routers must not commit a part of each."""
        update = self.update
        if update is None or not update.waits:
            return
        if (await self.state()).open_update != update.version:
            self.update = None
            return
        raise UpdateOrder(
            f"update {update.version} was verified for a router that has not said yet whether it "
            "serves; send this one again once that has ended",
            field="update",
        )

    async def make_room(self, begin: BeginUpdate) -> None:
        """Before a caller's own begin: settle an implicit update, drop one that failed."""
        open_one = self.update
        if open_one is None or not open_one.explicit:
            await self.settle()
        elif open_one.failed and open_one.version != begin.version:
            await self.abort(open_one)

    def note(self, command: UpdateCommand, reply: Reply) -> None:
        """Note what a caller that speaks the protocol itself opened, fed or ended."""
        match command:
            case BeginUpdate():
                self.failure = None
                self.update = TrackedUpdate(
                    version=command.version,
                    explicit=True,
                    partial=command.partial,
                    owner=command.owner,
                    foreign=True,
                )
            case CommitUpdate():
                self._labels.name(command.version, None)
                self.ended(reply.report)
            case _ if self.update is not None:
                self.update.failed = False
                self.update.num_feeds += not isinstance(command, PrepareUpdate)

    async def note_failure(self, command: UpdateCommand) -> None:
        """The engine drops an update whose transfer broke, and keeps one that may go on. A
        command of another update says nothing about the one that is open."""
        if self.update is None or isinstance(command, BeginUpdate):
            return
        if command.owner != self.update.owner:
            return
        version = self.update.version
        names = command.version if isinstance(command, _ENDS) else version
        if names != version:
            return
        self.update.failed = True
        if (await self.state()).open_update != self.update.version:
            self.update = None

    @contextlib.asynccontextmanager
    async def dropped_on_error(
        self, update: TrackedUpdate, *, rest_follows: bool
    ) -> AsyncIterator[None]:
        """Abort the update if what is inside fails. rest_follows: parts may come that are no
        whole without what was dropped, and have to be refused."""
        try:
            yield
        except SlipstreamError as error:
            if rest_follows and not update.explicit:
                self.failure = error
            await self.abort(update)
            raise

    def refuse_after_failure(self, *, over: bool) -> None:
        """Raise UpdateOrder for the rest of an update whose earlier part failed. over: this
        call was the last of its update, so that the next one starts anew."""
        failure = self.failure
        if failure is None:
            return
        if over:
            self.failure = None
        raise UpdateOrder(
            f"an earlier part of this update failed ({failure}); begin again by a pause or a begin",
            field="update",
        )

    @contextlib.contextmanager
    def named(self, version: int, label: str | None) -> Iterator[None]:
        """Call `version` by `label` before its first token can come, unless it never serves."""
        self._labels.name(version, label)
        done = False
        try:
            yield
            done = True
        finally:
            if not done:
                self._labels.name(version, None)

    def ended(self, report: UpdateReport | None) -> None:
        """Note the end of the open update. report: of its commit, None for an abort."""
        update, self.update = self.update, None
        if update is not None and report is not None:
            self._metrics.updated(time.monotonic() - update.began_at)
            self.needs_whole = self.needs_whole and update.partial
