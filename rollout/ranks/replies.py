"""What all ranks answered, as one answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from engine.errors import EngineDead, by_name
from engine.protocol import BesideSteps, ErrorInfo, Reply, UpdateReport
from rollout.ranks.monitor import RankMonitor
from rollout.ranks.process import RankProcess
from rollout.replica.command_replies import command_name, reply_of
from rollout.replica.weight_queue import PendingReply

_BESIDE_S = 0.001


@dataclass(kw_only=True)
class RankedReply:
    """A command that every rank runs beside steps: one answer, once all have answered."""

    command: BesideSteps
    call: int
    local: PendingReply
    ranks: Sequence[RankProcess]
    monitor: RankMonitor
    alike: Callable[[str, Sequence[Reply]], None]
    timeout_s: float
    started: float = field(default_factory=time.monotonic)
    found: dict[int, Reply] = field(default_factory=dict)

    def done(self) -> bool:
        """Whether every rank has answered, or one never will."""
        if self.monitor.failure is not None:
            return True
        try:
            self._look()
        except EngineDead as error:
            self.monitor.fail(error)
            return True
        return len(self.found) == len(self.ranks) and self.local.done()

    def result(self) -> Reply:
        """The answer of all. Raises the error of the first rank that failed, EngineDead when one
        is gone or late, or when a mistake of ours met only some."""
        while not self.done():
            time.sleep(_BESIDE_S)
        self.monitor.require_alive()
        what = command_name(self.command)
        own = reply_of(self.command, self.local.result)
        replies = [own, *(self.found[rank.rank] for rank in self.ranks)]
        self.alike(what, replies)
        return merge(replies)

    def _look(self) -> None:
        """Take in what has come. Raises EngineDead for a rank that is gone or late."""
        late = time.monotonic() - self.started > self.timeout_s
        what = command_name(self.command)
        for rank in self.ranks:
            if rank.rank in self.found:
                continue
            reply = rank.poll(self.call)
            if reply is not None:
                self.found[rank.rank] = reply
            elif late:
                raise rank.error(f"did not answer '{what}' within {self.timeout_s:g} s")
        if late and not self.local.done():
            raise EngineDead(f"rank 0 does not end '{what}'", field="rank 0")


def merge(replies: Sequence[Reply]) -> Reply:
    """One reply of the replies of rank 0, 1, ...: lists side by side, reports added up.

    Raises the error of the first rank that has one; the message says what the others said,
    unless every rank said the same.
    """
    errors = [reply.error for reply in replies]
    found = [(rank, error) for rank, error in enumerate(errors) if error is not None]
    if found:
        _, first = found[0]
        message = first.message if _all_alike(errors) else _by_rank(found, len(replies))
        raise by_name(first.kind, message, first.field)
    weights = [
        replace(report, rank=rank) for rank, reply in enumerate(replies) for report in reply.weights
    ]
    excerpts = [
        replace(found, rank=rank) for rank, reply in enumerate(replies) for found in reply.excerpts
    ]
    return replace(
        replies[0],
        report=_whole(replies),
        memory=[report for reply in replies for report in reply.memory],
        weights=weights,
        excerpts=excerpts,
        traces=[path for reply in replies for path in reply.traces],
    )


def _whole(replies: Sequence[Reply]) -> UpdateReport | None:
    reports = [reply.report for reply in replies if reply.report is not None]
    if not reports:
        return None
    return replace(
        reports[0],
        num_bytes=sum(report.num_bytes for report in reports),
        seconds=max(report.seconds for report in reports),
    )


def _all_alike(errors: Sequence[ErrorInfo | None]) -> bool:
    first = errors[0]
    return first is not None and all(
        error is not None and error.kind == first.kind and error.field == first.field
        for error in errors
    )


def _by_rank(found: Sequence[tuple[int, ErrorInfo]], num_ranks: int) -> str:
    said = "; ".join(f"rank {rank}: {error.kind}: {error.message}" for rank, error in found)
    rest = num_ranks - len(found)
    return f"{said} (the other {rest} of {num_ranks} ranks succeeded)" if rest else said
