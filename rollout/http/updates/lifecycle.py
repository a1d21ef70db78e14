"""Pause, memory and weight updates, as one state machine under every dialect.

serving -> paused -> updating -> serving; an update may also run while serving. Who waits for
whom: commands of updates wait for each other (`Updates`), a pause that waits for requests is
ended by any other pause or resume (`IdlePause`), and nothing else waits for anything here:
while a group forms or tensors are received, pauses, resumes, aborts and looks at the state go
to the engine at once.
"""

from __future__ import annotations

import asyncio
import time
from typing import Literal

from engine.errors import (
    NO_SAVER,
    EngineDead,
    InvalidRequest,
    SlipstreamError,
    UnsupportedOption,
    UpdateOrder,
)
from engine.protocol import (
    CheckWeights,
    Command,
    FlushCache,
    GetWeight,
    MemoryTag,
    Pause,
    PauseMode,
    ReleaseMemory,
    Reply,
    Resume,
    ResumeMemory,
    SetVersion,
)
from rollout.http.engine.client import AsyncEngine
from rollout.http.updates.idle_pause import IdlePause
from rollout.http.updates.operations import Operations, as_a_whole
from rollout.http.updates.tracked_update import UpdateCommand
from rollout.http.updates.update_sessions import Updates
from rollout.http.updates.version_labels import VersionLabels
from rollout.metrics import Metrics
from rollout.replica.command_replies import command_name

MAX_WAIT_S = 3600.0

_POLL_S = 0.02

_NOT_WHILE_RECEIVING = (CheckWeights, GetWeight, SetVersion)


class Lifecycle:
    """The control operations of the dialects.

    Every method raises the engine's typed error. What failed leaves no update open, and the
    engine serves what it served before, or refuses and says why. An operation that was begun
    ends as a whole, also when its caller is cancelled; only a pause that waits ends with its
    caller, since nobody would know of it.

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
        self._keeps_weights = keeps_weights
        self._idle = IdlePause(engine)
        self.updates = Updates(engine, labels, metrics, stands_still=lambda: self._idle.waiting)
        self.operations = Operations()

    def reset(self, *, weights_lost: bool = False) -> None:
        """Forget open updates and pauses: the engine was started anew. Called once every call
        to the old one has failed. weights_lost: it had taken an update and holds base weights,
        so that only a whole version serves again."""
        self._idle.cancel("a restart of the engine")
        self._idle.release()
        self.updates.reset(weights_lost=weights_lost)

    async def send(self, command: Command) -> Reply:
        """Run a command that has nothing to do with an open update. Raises UpdateOrder for one
        that cannot run beside tensors that are being received, unless they are soon there."""
        if isinstance(command, _NOT_WHILE_RECEIVING):
            await self.updates.quiet(command_name(command))
        return await self.operations.run(self._engine.send(command))

    async def pause(
        self, mode: PauseMode | Literal["wait"], *, clear_cache: bool = False, wait_s: float = 600.0
    ) -> str:
        """Stop stepping; idempotent. What became of an update that nobody had ended, or "".

        wait: once everything that runs has finished, within `wait_s` (MAX_WAIT_S at most);
        requests that come meanwhile wait for the resume. Raises UpdateTimeout, PauseCancelled
        when a resume or another pause came first, InvalidRequest when requests that are paused
        already would have to finish.
        """
        if mode == "wait":
            await self._idle.pause(min(wait_s, MAX_WAIT_S))
        dropped = await self.updates.settle()
        if mode != "wait":
            await self._pause_now(mode)
        if clear_cache:
            await self._flush_if_idle()
        return dropped

    @as_a_whole
    async def resume(self) -> str:
        """Commit an update that nobody else is going to, and step again. Idempotent. What is
        still on its way, or "".

        Raises what the commit was refused with, once: the update is dropped and nothing runs
        yet, and a second resume goes on with what served before.
        """
        self._idle.cancel("a resume")
        try:
            waiting = await self.updates.finish()
            await self._engine.send(Resume())
        finally:
            self._idle.release()
        return waiting

    async def sleep(
        self, mode: PauseMode | Literal["wait"], tags: list[MemoryTag], *, wait_s: float = 600.0
    ) -> Reply:
        """Pause as `pause` does and give memory back; an empty list means all of it.

        Whoever is told that there is no sleep here does not wake the engine up: what refuses it is
        looked at first, and leaves generation as it was. Raises what `pause` raises, and
        UnsupportedOption, InvalidRequest or UpdateOrder where the memory may not go.
        """
        state = await self._engine.state(max_age_s=0.0)
        if not state.releases:
            raise UnsupportedOption(NO_SAVER, field="memory.saver")
        if mode == "wait":
            await self._idle.pause(min(wait_s, MAX_WAIT_S))
        return await self._sleep(mode, tags, was_paused=state.paused)

    @as_a_whole
    async def release_memory(self, tags: list[MemoryTag]) -> Reply:
        """Give memory back; an empty list means all of it."""
        return await self._release(ReleaseMemory(tags=tags))

    @as_a_whole
    async def resume_memory(self, tags: list[MemoryTag]) -> Reply:
        """Take memory back; with the KV cache, an update that nobody else is going to commit
        is complete, since generation follows."""
        if not tags or "kv_cache" in tags:
            await self.updates.finish()
        await self.updates.quiet("a resume of memory")
        return await self._engine.send(ResumeMemory(tags=tags))

    async def flush(self, timeout_s: float = 0.0) -> None:
        """Drop every cached prefix; while requests hold pages, try again until `timeout_s`.
        Raises what the engine refused with. While requests run, an update that nobody else is
        going to commit is complete if it covers the model."""
        await self.updates.flushed()
        deadline = time.monotonic() + min(timeout_s, MAX_WAIT_S)
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

    async def forward(self, command: Command) -> Reply:
        """Run a command of a caller that speaks the protocol itself, which sees and moves the
        same state as the dialects."""
        match command:
            case Pause():
                await self.pause(command.mode)
                return Reply()
            case Resume():
                await self.resume()
                return Reply()
            case ReleaseMemory():
                return await self.release_memory(command.tags)
            case ResumeMemory():
                return await self.resume_memory(command.tags)
            case _ if isinstance(command, UpdateCommand):
                return await self.updates.forward(command)
            case _:
                return await self.send(command)

    @as_a_whole
    async def _sleep(
        self, mode: PauseMode | Literal["wait"], tags: list[MemoryTag], *, was_paused: bool
    ) -> Reply:
        await self.updates.settle()
        if mode != "wait":
            self._idle.cancel(f"a sleep by mode {mode}")
        try:
            pause: PauseMode = "keep" if mode == "wait" else mode
            return await self._release(ReleaseMemory(tags=tags, pause=pause))
        except (InvalidRequest, UpdateOrder):
            if mode == "wait" and not was_paused:
                await self._engine.send(Resume())
            raise
        finally:
            self._idle.release()

    async def _release(self, command: ReleaseMemory) -> Reply:
        await self.updates.quiet("a release of memory")
        reply = await self._engine.send(command)
        if not self._keeps_weights and (not command.tags or "weights" in command.tags):
            self.updates.weights_lost()
        return reply

    @as_a_whole
    async def _pause_now(self, mode: PauseMode) -> None:
        try:
            # The call that waits runs on only after the engine was sent the pause.
            self._idle.cancel(f"a pause by mode {mode}")
            await self._engine.send(Pause(mode=mode))
        finally:
            self._idle.release()

    @as_a_whole
    async def _flush_if_idle(self) -> None:
        try:
            await self._engine.send(FlushCache())
        except EngineDead:
            raise
        except SlipstreamError:
            # Requests kept by the pause hold pages; prefixes are keyed by version anyway.
            return
