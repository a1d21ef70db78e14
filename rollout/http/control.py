"""Pause, memory and weight updates, as one state machine under every dialect.

serving -> paused -> updating -> serving; an update may also run while serving. Dialects that
have sessions open and commit updates themselves. For callers that know none, the first tensors
open one, and it is committed by whatever comes first: a call that says it is the last, the
resume of generation or of the KV cache, the next pause, or the next explicit begin.

Callers that announce no manifest may send some tensors only, so their updates are partial; but
where the engine has no whole weights (released without a backup, or an update died in place),
nothing less than the whole model is committed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from engine.errors import EngineDead, SlipstreamError, UpdateOrder, UpdateTimeout
from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    CommitUpdate,
    FlushCache,
    GetState,
    LoadFromDisk,
    MemoryTag,
    Pause,
    PauseMode,
    ReceiveBroadcast,
    ReceiveIpc,
    ReleaseMemory,
    ReplicaState,
    Reply,
    Resume,
    ResumeMemory,
    SetVersion,
    TensorSpec,
    UpdateReport,
)
from engine.protocol import Control as Command
from rollout.http.engine_client import AsyncEngine
from rollout.http.versions import VersionLabels
from rollout.metrics import Metrics

Feed = ReceiveBroadcast | ReceiveIpc | LoadFromDisk

_POLL_S = 0.02


@dataclass(kw_only=True)
class _OpenUpdate:
    """The update between its begin and its commit. explicit: its caller commits it."""

    version: int
    explicit: bool
    partial: bool = True
    label: str | None = None
    num_feeds: int = 0
    began_at: float = field(default_factory=time.monotonic)


class Controller:
    """Runs control operations one at a time, in order of the calls.

    Every method raises the engine's typed error. What failed leaves no update open, and the
    engine serves what it served before, or refuses and says why.

    keeps_weights: released weights come back with their values.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        labels: VersionLabels,
        metrics: Metrics,
        *,
        keeps_weights: bool,
    ) -> None:
        self._engine = engine
        self._labels = labels
        self._metrics = metrics
        self._keeps_weights = keeps_weights
        self._weights_lost = False
        self._lock = asyncio.Lock()
        self._update: _OpenUpdate | None = None
        self._failure: SlipstreamError | None = None

    @property
    def updating(self) -> bool:
        """Whether an update is open."""
        return self._update is not None

    def reset(self) -> None:
        """Another engine has taken over: no update is open and nothing is released."""
        self._update, self._failure, self._weights_lost = None, None, False

    async def send(self, command: Command) -> Reply:
        """Run a command that has nothing to do with an open update, in its turn."""
        async with self._lock:
            return await self._engine.send(command)

    async def pause(
        self, mode: PauseMode | Literal["wait"], *, clear_cache: bool = False, wait_s: float = 600.0
    ) -> None:
        """Stop stepping; idempotent. wait: once everything that runs has finished, within
        `wait_s`; requests that come meanwhile wait for the resume. An update that nobody is
        going to commit is committed first. Raises UpdateTimeout."""
        async with self._lock:
            await self._commit_implicit()
            self._failure = None
            if mode == "wait":
                await self._pause_when_idle(wait_s)
            else:
                await self._engine.send(Pause(mode=mode))
            if clear_cache:
                await self._flush_if_idle()

    async def resume(self) -> None:
        """Commit an update that nobody else is going to, and step again. Idempotent."""
        async with self._lock:
            await self._commit_implicit()
            self._failure = None
            await self._engine.send(Resume())

    async def release_memory(self, tags: list[MemoryTag]) -> Reply:
        """Give memory back; an empty list means all of it."""
        async with self._lock:
            return await self._release(ReleaseMemory(tags=tags))

    async def resume_memory(self, tags: list[MemoryTag]) -> Reply:
        """Take memory back; with the KV cache, an update that nobody else is going to commit
        is complete, since generation follows."""
        async with self._lock:
            if not tags or "kv_cache" in tags:
                await self._commit_implicit()
            return await self._engine.send(ResumeMemory(tags=tags))

    async def flush(self, timeout_s: float = 0.0) -> None:
        """Drop every cached prefix; while requests hold pages, try again until `timeout_s`.
        Raises what the engine refused with."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                await self.send(FlushCache())
                return
            except EngineDead:
                raise
            except SlipstreamError:
                if time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(_POLL_S)

    async def begin(
        self, label: str | None = None, manifest: Sequence[TensorSpec] = (), *, partial: bool = True
    ) -> int:
        """Open an update that `commit` will end; its version. Begun again before anything
        came, it is the same update. Raises UpdateOrder."""
        async with self._lock:
            if self._update is not None and self._update.explicit:
                if (await self._state()).open_update is not None:
                    return self._begun_again(self._update)
                # The engine dropped it: it took too long, or a part of it failed.
                self._update = None
            await self._commit_implicit()
            self._failure = None
            await self._open(label, manifest, partial=partial, explicit=True)
            assert self._update is not None
            return self._update.version

    async def feed(self, command: Feed, label: str | None = None, *, last: bool = False) -> None:
        """Feed the open update, or one opened here. last: an update that its caller did not
        open is complete with this, and is committed."""
        async with self._lock:
            if self._failure is not None:
                raise UpdateOrder(
                    f"an earlier part of this update failed ({self._failure}); begin again by a "
                    "pause or a begin",
                    field="update",
                )
            if self._update is None:
                await self._open(label, (), partial=True, explicit=False)
            assert self._update is not None
            update = self._update
            update.label = label if label is not None else update.label
            async with self._dropped_on_error(update, lost=not last or update.num_feeds > 0):
                await self._engine.send(command)
                update.num_feeds += 1
            if last and update.partial and not update.explicit:
                await self._commit()

    async def commit(self, label: str | None = None) -> UpdateReport:
        """End the open update. Raises UpdateOrder without one."""
        async with self._lock:
            if self._update is None:
                raise UpdateOrder("no update is open; begin one first", field="update")
            if label is not None:
                self._update.label = label
            return await self._commit()

    async def load(self, path: str, label: str | None = None) -> UpdateReport:
        """One whole update from a folder; a caller's open update is left to its caller."""
        async with self._lock:
            if self._update is not None and self._update.explicit:
                raise UpdateOrder(
                    f"update {self._update.version} is open; end it first", field="update"
                )
            await self._commit_implicit()
            self._failure = None
            await self._open(label, (), partial=True, explicit=False)
            assert self._update is not None
            async with self._dropped_on_error(self._update, lost=False):
                await self._engine.send(LoadFromDisk(path=path))
            return await self._commit()

    async def set_version(self, label: str) -> int:
        """Call the weights that serve `label`; the version that stands for it. A label that
        they have already changes nothing."""
        async with self._lock:
            current = (await self._state()).version
            if self._labels.text(current) == label:
                return current
            version = self._labels.reserve(label, current)
            await self._engine.send(SetVersion(version=version))
            self._labels.name(version, label)
            return version

    async def forward(self, command: Command) -> Reply:
        """Run a command of a caller that speaks the protocol itself, keeping track of what it
        opens and ends."""
        if isinstance(command, ReleaseMemory):
            return await self.release_memory(command.tags)
        if not isinstance(command, BeginUpdate | CommitUpdate | AbortUpdate | Feed):
            return await self._engine.send(command)
        async with self._lock:
            if isinstance(command, BeginUpdate) and self._update and not self._update.explicit:
                await self._commit()
            self._failure = None
            reply = await self._engine.send(command)
            if isinstance(command, BeginUpdate):
                self._update = _OpenUpdate(
                    version=command.version, explicit=True, partial=command.partial
                )
            elif isinstance(command, CommitUpdate | AbortUpdate):
                self._ended(reply.report)
            elif self._update is not None:
                self._update.num_feeds += 1
            return reply

    def _begun_again(self, update: _OpenUpdate) -> int:
        if update.num_feeds:
            raise UpdateOrder(
                f"update {update.version} is open and has received tensors; end it first",
                field="update",
            )
        return update.version

    async def _open(
        self, label: str | None, manifest: Sequence[TensorSpec], *, partial: bool, explicit: bool
    ) -> None:
        state = await self._state()
        version = self._labels.reserve(label, state.version)
        died = bool(state.refusal) and not state.released
        partial = partial and not (self._weights_lost or died)
        begin = BeginUpdate(version=version, manifest=list(manifest), partial=partial)
        await self._engine.send(begin)
        self._update = _OpenUpdate(version=version, explicit=explicit, partial=partial, label=label)

    async def _commit_implicit(self) -> None:
        if self._update is not None and not self._update.explicit:
            await self._commit()

    async def _commit(self) -> UpdateReport:
        update = self._update
        assert update is not None
        async with self._dropped_on_error(update, lost=False):
            reply = await self._engine.send(CommitUpdate(version=update.version))
        self._labels.name(update.version, update.label)
        self._ended(reply.report)
        assert reply.report is not None, "a commit reports what it moved"
        return reply.report

    def _ended(self, report: UpdateReport | None) -> None:
        if self._update is not None and report is not None:
            self._metrics.updated(time.monotonic() - self._update.began_at)
            self._weights_lost = self._weights_lost and self._update.partial
        self._update = None

    async def _release(self, command: ReleaseMemory) -> Reply:
        reply = await self._engine.send(command)
        if not self._keeps_weights and (not command.tags or "weights" in command.tags):
            self._weights_lost = True
        return reply

    @contextlib.asynccontextmanager
    async def _dropped_on_error(self, update: _OpenUpdate, *, lost: bool) -> AsyncIterator[None]:
        """Abort the update if what is inside fails. lost: parts may follow that are no whole
        without what was dropped, and have to be refused."""
        try:
            yield
        except SlipstreamError as error:
            self._update = None
            if lost and not update.explicit:
                self._failure = error
            with contextlib.suppress(SlipstreamError):
                # Often the engine has dropped it by itself.
                await self._engine.send(AbortUpdate(version=update.version))
            raise

    async def _pause_when_idle(self, wait_s: float) -> None:
        deadline = time.monotonic() + wait_s
        self._engine.hold()
        try:
            while self._engine.num_open:
                if time.monotonic() > deadline:
                    raise UpdateTimeout(
                        f"{self._engine.num_open} requests still run after {wait_s:g} s; pause "
                        "by mode keep or abort",
                        field="mode",
                    )
                await asyncio.sleep(_POLL_S)
            await self._engine.send(Pause(mode="keep"))
        finally:
            self._engine.release()

    async def _flush_if_idle(self) -> None:
        try:
            await self._engine.send(FlushCache())
        except EngineDead:
            raise
        except SlipstreamError:
            # Requests kept by the pause hold pages; prefixes are keyed by version anyway.
            return

    async def _state(self) -> ReplicaState:
        reply = await self._engine.send(GetState())
        assert reply.state is not None
        return reply.state
