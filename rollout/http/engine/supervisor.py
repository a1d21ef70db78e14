"""What follows when the engine dies: the server leaves, or starts the engine again."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable

from engine.config import EngineConfig
from engine.errors import EngineDead, SlipstreamError
from rollout.http.config import ServeConfig
from rollout.http.engine.client import AsyncEngine
from rollout.http.engine.failure_window import MAX_FAILURES, WINDOW_S, FailureWindow
from rollout.http.engine.link import EngineLink

logger = logging.getLogger(__name__)

_PAUSE_S = 1.0

Spawn = Callable[[EngineConfig], EngineLink]
"""Begins to build an engine, and returns before it is built; ends the one before it."""


class Supervisor:
    """Follows one server's `--restart`.

    never: `give_up` is called with the reason, and the server leaves. on-failure: the engine is
    started again by `spawn`; at the third failure within ten minutes, `give_up`. An engine that
    is started again loads the model's own weights. If any update had been committed, those are
    not what was published, so it refuses to generate until a whole version is published; `label`
    gives the name of a version. Versions go on growing from the last one.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        config: ServeConfig,
        spawn: Spawn,
        give_up: Callable[[EngineDead], None],
        label: Callable[[int], str],
    ) -> None:
        self._engine = engine
        self._config = config
        self._spawn = spawn
        self._give_up = give_up
        self._label = label
        self._failures = FailureWindow()
        self._task: asyncio.Task[None] | None = None
        engine.on_death(self._died)

    async def close(self) -> None:
        """Start nothing more. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def _died(self, error: EngineDead) -> None:
        if self._engine.leaving is not None:
            return
        if self._config.restart == "never":
            self._give_up(error)
        else:
            self._task = asyncio.create_task(self._revive(error))

    async def _revive(self, error: SlipstreamError) -> None:
        cause = _first_line(error)
        while self._failures.may_try(time.monotonic()):
            self._engine.explain(
                f"{cause}; the engine is being started again, send this again later"
            )
            await asyncio.sleep(_PAUSE_S * (len(self._failures) - 1))
            link = self._spawn(self._next_config(cause))
            try:
                await self._engine.restart(
                    link, start_s=self._config.start_s, no_version=self._refusal(cause)
                )
            except SlipstreamError as again:
                link.stop()
                if self._engine.leaving is not None:
                    return
                cause = _first_line(again)
                logger.error("the engine could not be started again: %s", again)
            else:
                logger.info("the engine was started again")
                return
        message = f"{cause}; the engine failed {MAX_FAILURES} times within {WINDOW_S:g} s"
        self._engine.explain(message)
        self._give_up(EngineDead(message, field="leader"))

    def _next_config(self, cause: str) -> EngineConfig:
        return dataclasses.replace(
            self._config.engine,
            weight_version=self._engine.version,
            refusal=self._refusal(cause),
        )

    def _refusal(self, cause: str) -> str:
        if not self._engine.took_update:
            return ""
        lost = self._label(self._engine.version)
        return (
            f"the engine was started again ({cause}), and with the old one went version {lost}, "
            "the last that was published: publish a whole version"
        )


def _first_line(error: SlipstreamError) -> str:
    return error.message.partition("\n")[0]
