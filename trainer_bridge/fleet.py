"""One update over several engines: who takes it, and a commit that all of them make or none.

Two phases. Every engine first verifies what it received (`PrepareUpdate`), so that no commit is
refused for what came; then every engine commits. A commit is idempotent: one whose answer was
lost is asked for again. An engine that dies between the two phases leaves a fleet of two
versions, which `FleetDivided` names; the same version may then be pushed again, and goes to
those that do not serve it yet.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from msgspec.structs import replace

from engine.errors import EngineDead, FleetDivided, SlipstreamError
from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    CheckWeights,
    Command,
    CommitUpdate,
    PrepareUpdate,
    ReplicaState,
    Reply,
    UpdateReport,
)
from trainer_bridge.http_target import HttpTarget
from trainer_bridge.update_target import UpdateTarget, state_of, try_send

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

_COMMIT_ATTEMPTS = 4
_COMMIT_PAUSE_S = 0.1
_COMMIT_RETRY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Member:
    """One engine that takes an update.

    name: how errors call it; "" for the only one. state: what it said before the update.
    """

    target: UpdateTarget
    name: str
    state: ReplicaState

    def send(self, command: Command) -> Reply:
        """Run one control command; the error of a refusal names the engine."""
        try:
            return self.target.send(command)
        except SlipstreamError as error:
            if not self.name:
                raise
            raise _named(self.name, error) from error

    def serves(self, version: int) -> bool:
        """Whether it served `version`, and all of it, before the update."""
        return self.state.version == version and not self.state.refusal


def divide(targets: Sequence[UpdateTarget], version: int) -> tuple[list[Member], list[Member]]:
    """(engines that have yet to take `version`, engines that serve it already).

    The second list has members only where an earlier push of this version reached a part of
    the fleet: if all serve it, all are asked again, and refuse. Raises EngineDead naming the
    engine that does not answer.
    """
    names = _names(targets)

    def look(place: int) -> Member:
        try:
            state = state_of(targets[place])
        except SlipstreamError as error:
            raise _named(names[place], error) from error
        return Member(target=targets[place], name=names[place], state=state)

    members = on_each(range(len(targets)), look)
    taking = [member for member in members if not member.serves(version)]
    holding = [member for member in members if member.serves(version)]
    return (taking, holding) if taking else (members, [])


def owned(begin: BeginUpdate, owner: str) -> BeginUpdate:
    """The update of a sender: `owner` unless its caller drew one. Without one, an engine could
    not tell two trainers apart that push at once."""
    return begin if begin.owner else replace(begin, owner=owner)


def draw_owner() -> str:
    """What a sender calls its updates by, from its making to its end."""
    return uuid.uuid4().hex


def prepare(members: Sequence[Member], begin: BeginUpdate) -> None:
    """First phase: every engine verifies what it received, and places nothing.

    One engine alone needs no first phase, since its commit verifies.
    """
    if len(members) > 1:
        command = PrepareUpdate(version=begin.version, owner=begin.owner)
        on_each(members, lambda member: member.send(command))


def commit(taking: Sequence[Member], holding: Sequence[Member], begin: BeginUpdate) -> UpdateReport:
    """Second phase: every engine of `taking` commits. Returns the first one's report.

    holding: engines that served `version` before; they must hold the same weights then.
    Raises the error of an engine that did not commit if nobody serves `version`, else
    FleetDivided.
    """
    version = begin.version
    outcomes = on_each(taking, lambda member: _commit_one(member, begin))
    reports = [outcome for outcome in outcomes if isinstance(outcome, UpdateReport)]
    failures = {
        member.name: outcome
        for member, outcome in zip(taking, outcomes, strict=True)
        if isinstance(outcome, SlipstreamError)
    }
    if failures:
        give_up([member for member in taking if member.name in failures], begin)
        done = [m.name for m in [*holding, *taking] if m.name not in failures]
        if not done:
            raise next(iter(failures.values()))
        raise _divided(version, done, failures)
    for member in holding:
        _require_alike(member, taking[0], version)
    return reports[0]


def give_up(members: Sequence[Member], begin: BeginUpdate) -> None:
    """Abort the update wherever it is open, without hiding the error that led here. An engine
    that refused the begin, since another's update is open there, keeps that: the owner differs."""
    command = AbortUpdate(version=begin.version, owner=begin.owner)
    on_each(members, lambda member: try_send(member.target, command))


def on_each(items: Sequence[T], call: Callable[[T], R]) -> list[R]:
    """Call for every item at once, each in a thread of its own; results in their order.

    Waits for all, then raises the first error, if any.
    """
    if len(items) < 2:
        return [call(item) for item in items]
    with ThreadPoolExecutor(len(items)) as pool:
        futures = [pool.submit(call, item) for item in items]
    return [future.result() for future in futures]


def _commit_one(member: Member, begin: BeginUpdate) -> UpdateReport | SlipstreamError:
    """Commit on one engine; asks again while the answer is lost, as an engine that committed
    reports again, and one that was started again has no such update and says so."""
    started = time.monotonic()
    for attempt in range(1, _COMMIT_ATTEMPTS + 1):
        outcome = _ask_commit(member, begin)
        if not isinstance(outcome, EngineDead):
            break
        logger.warning("the commit of version %d has no answer: %s", begin.version, outcome)
        if attempt == _COMMIT_ATTEMPTS or (
            attempt > 1 and time.monotonic() - started > _COMMIT_RETRY_S
        ):
            break
        time.sleep(_COMMIT_PAUSE_S * attempt**2)
    return outcome


def _ask_commit(member: Member, begin: BeginUpdate) -> UpdateReport | SlipstreamError:
    try:
        command = CommitUpdate(version=begin.version, owner=begin.owner)
        report = member.send(command).report
    except SlipstreamError as error:
        return error
    assert report is not None, "a commit must report what it moved"
    return report


def _require_alike(held: Member, took: Member, version: int) -> None:
    """Raise FleetDivided if an engine that served `version` before has other weights than one
    that took it now: then two pushes gave the same number to different weights. Engines whose
    weights lie differently cannot be compared."""
    if _layout(held.state) != _layout(took.state):
        return
    before, now = on_each([held, took], lambda member: member.send(CheckWeights()).weights)
    if [report.checksums for report in before] != [report.checksums for report in now]:
        raise FleetDivided(
            f"{held.name} and {took.name} both serve version {version}, with different weights: "
            f"it was published twice. Push a version above {version} to all of them",
            field=held.name,
        )


def _layout(state: ReplicaState) -> tuple[int, int, str, str]:
    return state.tp_size, state.dp_size, state.dtype, state.device.partition(":")[0]


def _divided(
    version: int, done: Sequence[str], failures: dict[str, SlipstreamError]
) -> FleetDivided:
    behind = "; ".join(error.message for error in failures.values())
    return FleetDivided(
        f"version {version} serves on {', '.join(done)}, and not on {', '.join(failures)} "
        f"({behind}). Push version {version} again: it goes to those left behind",
        field=next(iter(failures)),
    )


def _names(targets: Sequence[UpdateTarget]) -> list[str]:
    if len(targets) == 1:
        return [""]
    return [
        f"engine {place} ({target.url})" if isinstance(target, HttpTarget) else f"engine {place}"
        for place, target in enumerate(targets)
    ]


def _named(name: str, error: SlipstreamError) -> SlipstreamError:
    """The same error, with the engine in its message."""
    if not name or error.message.startswith(name):
        return error
    return type(error)(f"{name}: {error.message}", field=error.field)
