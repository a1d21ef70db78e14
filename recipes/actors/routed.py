"""Engines behind a router: it gives each request to one of them and loses none; weights go to each
by its name, through the router, so that those left behind take a version again by themselves."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

import msgspec

from engine.errors import EngineDead, FleetDivided, InvalidRequest, SlipstreamError
from engine.protocol import FlushCache, GetState, ReplicaState, Request, RequestOutput
from recipes.actors.fleet import another_trainer
from recipes.actors.fleet_engine import lost_with
from rollout.replica.remote.http_replica import HttpReplica
from trainer_bridge.http_target import HttpTarget

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LOOK_S = 0.5
_MOST_AT_ONCE = 64


class _Facts(msgspec.Struct):
    takes_weights: bool = False
    state: str = ""


class RoutedWorker(msgspec.Struct):
    """A worker as the router tells of it. id: by which the router calls it."""

    id: str
    url: str
    metadata: _Facts


class _Roster(msgspec.Struct):
    workers: list[RoutedWorker]


class RoutedEngines:
    """The workers of a router, as `Engines`: who takes weights is looked up before each update.

    replica: the router. admin_key: of its control routes. patience_s: most that is waited for it,
    or for a worker to join, before EngineDead (`endpoint`) is raised. count: workers that are
    waited for at first. at_end: what `close` ends too.
    """

    def __init__(
        self, replica: HttpReplica, *, admin_key: str, patience_s: float, count: int = 1
    ) -> None:
        self.at_end = ExitStack()
        self._replica = replica
        self._admin_key = admin_key
        self._patience_s = patience_s
        self.workers: list[RoutedWorker] = []
        self.targets: list[HttpTarget] = []
        self.base = 0
        self._wait_for(count)
        found = [state.version for state in self._states() if state is not None]
        self._newest = max(found, default=0)
        # The first push of a run has the number 0.
        self.base = self._newest + 1

    def generate(
        self, requests: Sequence[Request], done: dict[str, RequestOutput]
    ) -> SlipstreamError | None:
        """See `Engines`."""
        lost: SlipstreamError | None = None
        try:
            self._replica.submit(requests)
            while not self._replica.idle():
                for output in self._replica.step():
                    loss = lost_with(output)
                    if loss is None:
                        done[output.rid] = output
                    lost = loss or lost
        except EngineDead as error:
            return error
        return lost

    def behind(self, version: int) -> list[str]:
        """See `Engines`; asks all that live, which tells the router too. Raises UpdateOrder if one
        has what this run did not publish."""
        self._newest = max(self._newest, version)
        self.revive()
        found = []
        for worker, state in zip(self.workers, self._states(), strict=True):
            if state is None:
                continue
            if state.version > self._newest:
                raise another_trainer(state.version)
            if state.version != version or state.refusal:
                found.append(worker.url)
        return found

    def revive(self) -> None:
        """See `Engines`: wait until there is a worker; who is there takes the next update."""
        self._wait_for(1)

    def _wait_for(self, count: int) -> None:
        deadline = time.monotonic() + self._patience_s
        told = False
        while True:
            try:
                self._look()
                if len(self.targets) >= count:
                    return
                few = f"{len(self.targets)} of {count} workers" if self.targets else "no worker"
                why = f"it has {few} that could take weights"
            except EngineDead as error:
                why = error.message
            if time.monotonic() > deadline:
                raise EngineDead(
                    f"endpoint: {self._replica.url} cannot be used for {self._patience_s:g} s: "
                    f"{why}; start it again, or give it more time by --endpoint-patience",
                    field="endpoint",
                )
            if not told:
                logger.warning("endpoint: waiting for %s: %s", self._replica.url, why)
                told = True
            time.sleep(_LOOK_S)

    def is_loss(self, error: SlipstreamError) -> bool:
        """See `Engines`: also where others are there than took part, or one of them is gone."""
        if isinstance(error, EngineDead | FleetDivided):
            return True
        before = {target.url for target in self.targets}
        self.revive()
        return before != {target.url for target in self.targets} or None in self._states()

    def flush(self) -> None:
        """See `Engines`. One that has requests of others keeps what it has."""

        def forget(target: HttpTarget) -> None:
            try:
                target.send(FlushCache())
            except SlipstreamError as error:
                logger.info("%s keeps its cached prefixes: %s", target.url, error)

        self._on_each(forget)

    def state(self) -> ReplicaState:
        """See `Engines`. Raises what the first says where none of them tells."""
        found = next((state for state in self._states() if state is not None), None)
        found = found or self.targets[0].send(GetState()).state
        assert found is not None, "a state is what answers GetState"
        return found

    def close(self) -> None:
        """See `Engines`: those that others started go on without this run."""
        self._replica.close()
        self.at_end.close()

    def _look(self) -> None:
        """Look up who there is."""
        try:
            roster = msgspec.convert(self._replica.client.call("/workers"), _Roster)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise InvalidRequest(
                f"endpoint: {self._replica.url} does not answer as a router of ours: {error}",
                field="endpoint",
            ) from error
        self.workers = [w for w in roster.workers if w.metadata.takes_weights]
        self.targets[:] = [
            HttpTarget(f"{self._replica.url}/workers/{worker.id}", api_key=self._admin_key)
            for worker in self.workers
        ]

    def _states(self) -> list[ReplicaState | None]:
        """What each of them is; None of one that does not answer."""

        def ask(target: HttpTarget) -> ReplicaState | None:
            try:
                return target.send(GetState()).state
            except SlipstreamError as error:
                logger.warning("endpoint: %s", error)
                return None

        return self._on_each(ask)

    def _on_each(self, call: Callable[[HttpTarget], T]) -> list[T]:
        with ThreadPoolExecutor(min(len(self.targets), _MOST_AT_ONCE)) as pool:
            return list(pool.map(call, self.targets))
