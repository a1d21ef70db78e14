"""Engines in processes of their own, fed while the trainer computes.

They step by themselves; the trainer reads what has come when it waits for a batch. An engine that
is lost comes back with the weights that were pushed last, and what it was working on is asked
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby
from typing import Protocol

from engine.errors import EngineDead
from engine.protocol import Abort, Request, RequestOutput
from recipes.actors.fleet import MOST_LOSSES
from recipes.actors.fleet_engine import FleetEngine, lost_with


class Fleet(Protocol):
    """What is fed: a `FleetActor`."""

    @property
    def engines(self) -> Sequence[FleetEngine]:
        """Each a replica that may be started again."""

    def restore(self) -> None:
        """Have every engine serve the weights that were pushed last."""


class FleetStream:
    """A `ReplyStream` over the engines of a fleet. What these wait is counted in seconds; what the
    trainer does is the phase "generate" of the run's ledger."""

    def __init__(self, actor: Fleet) -> None:
        self._actor = actor
        self._open: list[dict[str, Request]] = [{} for _ in actor.engines]
        self._num_losses = 0
        self._idle_s = self._engines_idle()

    def submit(self, requests: Sequence[Request]) -> None:
        """See `ReplyStream`. A group goes whole to the engine that has the fewest requests."""
        deals: list[list[Request]] = [[] for _ in self._open]
        for _, group in groupby(requests, key=lambda request: request.group or request.rid):
            place = min(range(len(self._open)), key=lambda p: len(self._open[p]))
            members = list(group)
            deals[place] += members
            self._open[place].update((request.rid, request) for request in members)
        for engine, deal in zip(self._actor.engines, deals, strict=True):
            # One that is gone is noticed, and has these back, when it is next looked at.
            with suppress(EngineDead):
                if deal:
                    engine.submit(deal)

    def poll(self) -> list[RequestOutput]:
        """See `ReplyStream`. Raises the error of an engine that is lost more than `MOST_LOSSES`
        times in a step."""
        outputs: list[RequestOutput] = []
        lost: list[Request] = []
        why: EngineDead | None = None
        for place in range(len(self._open)):
            ended, gone, error = self._finished(place)
            outputs += ended
            lost += gone
            why = error or why
        if why is not None:
            self._num_losses += 1
            if self._num_losses > MOST_LOSSES:
                raise why
            self._actor.restore()
            self.submit(lost)
        return outputs

    def during_update(self) -> list[RequestOutput]:
        """See `ReplyStream`: what came is read by the next `poll`."""
        return []

    def withdraw(self) -> list[RequestOutput]:
        """See `ReplyStream`. What a lost engine was working on is not among them."""
        for engine, opened in zip(self._actor.engines, self._open, strict=True):
            with suppress(EngineDead):
                if opened:
                    engine.send(Abort(rids=list(opened), message="withdrawn, to go on later"))
        outputs: list[RequestOutput] = []
        while any(self._open):
            for place in range(len(self._open)):
                outputs += self._finished(place)[0]
        return outputs

    def waits(self) -> dict[str, float]:
        """See `ReplyStream`: of the engines, the mean."""
        before, self._idle_s = self._idle_s, self._engines_idle()
        pairs = zip(self._idle_s, before, strict=True)
        # One that was started again counts from its own beginning.
        idle = [now - then if now >= then else now for now, then in pairs]
        self._num_losses = 0
        return {"async/engine_wait_s": sum(idle) / max(len(idle), 1)}

    def _finished(self, place: int) -> tuple[list[RequestOutput], list[Request], EngineDead | None]:
        """Final outputs of one engine; the requests that were lost with it, and by what error."""
        opened = self._open[place]
        if not opened:
            return [], [], None
        try:
            found = self._actor.engines[place].finished()
        except EngineDead as error:
            gone = list(opened.values())
            opened.clear()
            return [], gone, error
        mine = [(opened.pop(o.rid), o) for o in found if o.rid in opened]
        losses = [(request, loss) for request, output in mine if (loss := lost_with(output))]
        ended = [output for _, output in mine if lost_with(output) is None]
        gone = [request for request, _ in losses]
        return ended, gone, losses[0][1] if losses else None

    def _engines_idle(self) -> list[float]:
        """Seconds in which each engine had nothing to do, so far; 0 of one that is gone."""
        found = []
        for engine in self._actor.engines:
            idle_s = 0.0
            with suppress(EngineDead):
                idle_s = engine.state().idle_s
            found.append(idle_s)
        return found
