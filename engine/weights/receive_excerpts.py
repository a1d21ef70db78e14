"""What this rank reads of each tensor, from every trainer rank at once, into the open update.

A stage is some tensors that come together, whole at its end. While one is taken in, the next is in
flight. Over NCCL a large part arrives where it stays: in the live weights where an update is
written in place and they are the same bytes, else in memory that waits for the commit. Small parts
are packed, and copied from their message.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from engine.errors import GroupError, ManifestMismatch, SlipstreamError
from engine.protocol import BUCKET_ALIGNMENT, PlanExcerpts, RankExcerpts, ReceiveExcerpts
from engine.protocol.deadlines import capped
from engine.weights import verify
from engine.weights.catalog import copy_each
from engine.weights.excerpt_plan import (
    ExcerptPlan,
    PlannedMessage,
    PlannedStage,
    PlannedUnit,
    plan_excerpts,
)
from engine.weights.group import Group
from engine.weights.groups import Groups
from engine.weights.helpers import nothing
from engine.weights.lane import Look
from engine.weights.session import UpdateSession

_IN_FLIGHT = 2

_ALIGNMENT = 256

Units = list[tuple[PlannedUnit, torch.Tensor]]
Place = tuple[int, int]
Sinks = dict[Place, torch.Tensor]


@dataclass(frozen=True)
class _Arrival:
    """A stage on its way.

    sinks: where the elements of each unit belong, flat, by the number of its tensor and its block.
    live: those that are live weights. scattered: messages that arrive elsewhere, and where. memory:
    what messages write to, beside live weights.
    """

    stage: PlannedStage
    ticket: Any
    sinks: Sinks
    live: frozenset[Place]
    scattered: list[tuple[PlannedMessage, torch.Tensor]]
    memory: list[torch.Tensor]


class ExcerptReceiver:
    """Owner of the plans of this rank, one a group, as long as the group is the same."""

    def __init__(self, session: UpdateSession, groups: Groups) -> None:
        self._session = session
        self._groups = groups
        self._plans: dict[str, tuple[Group, ExcerptPlan]] = {}

    def plan(self, command: PlanExcerpts) -> RankExcerpts:
        """Run one `PlanExcerpts`. Raises GroupError for a group that is not there or has other
        senders, and ManifestMismatch as `plan_excerpts` does."""
        group = self._groups.get(command.group)
        senders = self._groups.senders(command.group)
        if senders != len(command.shares):
            raise GroupError(
                f"group {command.group!r} has {senders} sending ranks, and there are shares of "
                f"{len(command.shares)}",
                field="shares",
            )
        plan = plan_excerpts(command, self._session.catalog)
        open_groups = self._groups.names
        self._plans = {name: kept for name, kept in self._plans.items() if name in open_groups}
        self._plans[command.group] = (group, plan)
        return plan.needs

    def receive(self, command: ReceiveExcerpts, look: Look = nothing) -> None:
        """Run one `ReceiveExcerpts`; look and errors as in `receive.receive_broadcast`."""
        session = self._session
        plan: ExcerptPlan | None = None
        refusal: SlipstreamError | None = None
        try:
            look()
            session.require_owned("receive", command.owner)
            plan = self._plan_of(command.group)
            session.expect(plan.tensors)
            _require_sums(session, plan)
        except SlipstreamError as error:
            refusal = error
        tensors = () if plan is None else plan.tensors
        with session.receiving(tensors, refusal):
            assert plan is not None, "what has none is refused"
            memory: list[torch.Tensor] = []
            transfer: _Transfer | None = None
            done = False
            try:
                group = self._groups.get(command.group)
                group.look = look
                self._groups.lend(command.group, memory)
                transfer = _Transfer(session, group, plan, memory, command.timeout_s)
                transfer.run()
                group.look = nothing
                self._groups.lend(command.group, ())
                done = True
            finally:
                # Before the memory goes that messages still write to.
                if not done and not self._groups.leave(command.group) and transfer is not None:
                    transfer.forsake()

    def _plan_of(self, name: str) -> ExcerptPlan:
        group = self._groups.get(name)
        kept = self._plans.get(name)
        if kept is None or kept[0] is not group:
            raise GroupError(f"nothing is planned for group {name!r}: plan first", field="group")
        return kept[1]


def _require_sums(session: UpdateSession, plan: ExcerptPlan) -> None:
    """Raise ManifestMismatch where a checksum was announced of a tensor that does not come whole:
    a rank alone could not tell."""
    if plan.command.whole:
        return
    announced = session.require_open("receive").announced
    named = next((p.name for p in plan.tensors if _is_summed(announced.get(p.name))), None)
    if named is not None:
        raise ManifestMismatch(
            f"{named} was announced with a checksum, which needs all of it: plan with `whole`",
            field=named,
        )


def _is_summed(spec: Any) -> bool:
    return spec is not None and spec.checksum is not None


class _Transfer:
    """One update's stages. memory: filled with what messages may be writing to, as long as they
    may."""

    def __init__(
        self,
        session: UpdateSession,
        group: Group,
        plan: ExcerptPlan,
        memory: list[torch.Tensor],
        timeout_s: float,
    ) -> None:
        self._session = session
        self._catalog = session.catalog
        self._update = session.require_open("receive")
        self._group = group
        self._plan = plan
        self._memory = memory
        self._deadline = session.deadline(capped(timeout_s))
        self._in_flight: deque[_Arrival] = deque()
        self._wrote_live = False

    def run(self) -> None:
        """Receive every stage, and take it in."""
        for stage in self._plan.stages:
            if len(self._in_flight) == _IN_FLIGHT:
                self._take_in(self._in_flight.popleft())
            self._in_flight.append(self._begin(stage))
        while self._in_flight:
            self._take_in(self._in_flight.popleft())

    def forsake(self) -> None:
        """The transfer failed, and may write to its memory still. If that is live weights, putting
        old ones back is of no use: the rank refuses to step until a whole update came."""
        if self._wrote_live:
            self._update.undo = None

    def _begin(self, stage: PlannedStage) -> _Arrival:
        """Have the messages of a stage come."""
        sinks, live, memory = self._sinks_of(stage)
        coming: list[tuple[torch.Tensor, int]] = []
        scattered: list[tuple[PlannedMessage, torch.Tensor]] = []
        for message in stage.messages:
            buffer = self._in_place(message, sinks)
            if buffer is None:
                buffer = self._group.empty(message.num_bytes)
                scattered.append((message, buffer))
                memory.append(buffer)
            coming.append((buffer, message.source))
        arriving = [tensor for other in self._in_flight for tensor in other.memory]
        self._memory[:] = [*arriving, *memory]
        ticket = self._group.receive(coming, self._deadline, stage.first_name)
        return _Arrival(stage, ticket, sinks, live, scattered, memory)

    def _sinks_of(self, stage: PlannedStage) -> tuple[Sinks, frozenset[Place], list[torch.Tensor]]:
        """Where the units of a stage go, which of those are live weights, and memory for the
        others: one piece for all of a dtype, since there may be thousands."""
        sinks: Sinks = {}
        live: dict[Place, str] = {}
        others: dict[torch.dtype, list[tuple[Place, int]]] = {}
        for number, units in stage.units.items():
            for block, unit in enumerate(units):
                sink = self._live(unit)
                if sink is None:
                    others.setdefault(unit.dtype, []).append(((number, block), unit.size))
                else:
                    live[number, block] = unit.name
                    sinks[number, block] = sink
        if live:
            self._update.keep(live.values(), self._catalog)
            self._wrote_live = True
        memory = []
        for dtype, places in others.items():
            step = _ALIGNMENT // dtype.itemsize
            padded = [-(-size // step) * step for _, size in places]
            memory.append(torch.empty(sum(padded), dtype=dtype, device=self._catalog.device))
            cut = memory[-1].split_with_sizes(padded)
            for (place, size), room, run in zip(places, padded, cut, strict=True):
                sinks[place] = run if room == size else run[:size]
        return sinks, frozenset(live), memory

    def _live(self, unit: PlannedUnit) -> torch.Tensor | None:
        """The live weights, flat, where a unit can be received there."""
        if not (self._update.in_place and self._group.lands and unit.is_excerpt and unit.alone):
            return None
        target = self._catalog.live(unit.name, unit.dtype)
        if target is None or target.data_ptr() % BUCKET_ALIGNMENT:
            return None
        return target.view(-1)

    def _in_place(self, message: PlannedMessage, sinks: Sinks) -> torch.Tensor | None:
        """The bytes that a message is of, where it can be received there."""
        if not self._group.lands or len(message.parts) > 1:
            return None
        part = message.parts[0]
        sink = sinks[part.tensor, part.block][part.start : part.stop].view(torch.uint8)
        return None if sink.data_ptr() % BUCKET_ALIGNMENT else sink

    def _take_in(self, arrival: _Arrival) -> None:
        self._group.wait(arrival.ticket, self._deadline)
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        for message, buffer in arrival.scattered:
            sources += message.cut(buffer, self._plan.dtypes)
            for tensor, block, start, stop, _ in message.parts:
                sink = arrival.sinks[tensor, block]
                is_whole = not start and stop == sink.numel()
                targets.append(sink if is_whole else sink[start:stop])
        copy_each(targets, sources)
        self._take_units(*_units_of(arrival, self._catalog.device))

    def _take_units(self, held: Units, live: Units) -> None:
        """Take in whole units, and read them for NaN and inf: what comes next is on its way
        meanwhile."""
        update, came = self._session.require_open("receive"), [*held, *live]
        update.origins.update({u.name: u.origin for u, _ in came if u.origin is not None})
        excerpts = [unit.name for unit, _ in came if unit.is_excerpt]
        written = {unit.name: tensor for unit, tensor in live}
        update.take_units({u.name: tensor for u, tensor in held}, written, excerpts, self._catalog)
        waiting = {u.name: update.staged[u.name] for u, _ in held if u.name in update.staged}
        verify.scan(update, self._catalog, waiting | written)


def _units_of(arrival: _Arrival, device: torch.device) -> tuple[Units, Units]:
    """The units of a stage that lie in memory of their own, and those in the live weights."""
    held: Units = [
        (unit, torch.empty(unit.shape, dtype=unit.dtype, device=device))
        for unit in arrival.stage.absent
    ]
    live: Units = []
    for number, units in arrival.stage.units.items():
        for block, unit in enumerate(units):
            sink = arrival.sinks[number, block].view(unit.shape)
            (live if (number, block) in arrival.live else held).append((unit, sink))
    return held, live
