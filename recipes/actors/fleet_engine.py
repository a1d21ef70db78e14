"""One engine of a fleet: a replica that is started again when it dies."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from engine.errors import EngineDead, SlipstreamError, WeightUpdateError
from engine.protocol import Command, ReplicaState, Reply, Request, RequestOutput
from rollout.offline import run
from rollout.replica.base import Replica

logger = logging.getLogger(__name__)

Launch = Callable[[], Replica]
"""Starts the engine's replica anew, from its configuration."""

_LOST = {"EngineDead", "WeightUpdateError", "NoVersion"}
"""Errors of a request that say nothing of it: its engine died, or holds no whole weights."""


class FleetEngine:
    """Stands for one engine whatever replica serves it now; an `UpdateTarget` of the carriers.

    launch: None for an engine that somebody else starts again.
    """

    def __init__(self, place: int, replica: Replica, launch: Launch | None) -> None:
        self.place = place
        self._replica = replica
        self._launch = launch

    def send(self, command: Command) -> Reply:
        """Run one control command on the replica; raises its typed error."""
        return self._replica.send(command)

    def state(self) -> ReplicaState:
        """What the replica is. Raises EngineDead."""
        return self._replica.state()

    def serves(self, version: int) -> bool:
        """Whether it lives and serves `version`, all of it."""
        try:
            state = self.state()
        except EngineDead:
            return False
        return state.version == version and not state.refusal

    def lives(self) -> bool:
        """Whether it answers."""
        try:
            self.state()
        except EngineDead:
            return False
        return True

    def generate(
        self, requests: Sequence[Request], done: dict[str, RequestOutput]
    ) -> SlipstreamError | None:
        """Run requests; final outputs go to `done` by id as they come.

        Returns the error by which the engine was lost, if so; the requests that it took with
        it are not in `done`.
        """
        lost: SlipstreamError | None = None
        try:
            for output in run(self._replica, requests, total=len(requests)):
                loss = lost_with(output)
                if loss is None:
                    done[output.rid] = output
                lost = loss or lost
        except (EngineDead, WeightUpdateError) as error:
            return error
        return lost

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, for a caller that reads `finished`. Raises EngineDead."""
        self._replica.submit(requests)

    def finished(self) -> list[RequestOutput]:
        """Final outputs that have come; waits a moment for the first. Raises EngineDead."""
        return [output for output in self._replica.step() if output.finish is not None]

    def revive(self) -> None:
        """Start a replica that died again; one that lives is left alone.

        Raises EngineDead for one that is not ours to start, and the error of one that does not
        start.
        """
        try:
            self.state()
            return
        except EngineDead as error:
            if self._launch is None:
                raise EngineDead(
                    f"engine {self.place} is gone: {error.message}", field="engine"
                ) from error
            logger.warning("engine %d is started again: %s", self.place, error)
        self._replica.close()
        self._replica = self._launch()

    def close(self) -> None:
        """Free the replica."""
        self._replica.close()


def lost_with(output: RequestOutput) -> EngineDead | None:
    """Why an engine is lost that ended a request so; None if the output is the request's own."""
    finish = output.finish
    if finish is None or finish.error not in _LOST:
        return None
    return EngineDead(finish.message or finish.error, field="engine")
