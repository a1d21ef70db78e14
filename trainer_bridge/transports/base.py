"""What every transport does: carry the tensors of one open update to the engines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from engine.protocol import AbortUpdate, BeginUpdate, CommitUpdate, Reply, UpdateReport
from trainer_bridge.adapters.base import WeightSource
from trainer_bridge.control import UpdateTarget, try_send

T = TypeVar("T")


class Carrier(ABC):
    """A connection to some engines, made at the first update and kept."""

    targets: Sequence[UpdateTarget]
    published: BeginUpdate | None = None
    """The last update that every target committed."""

    def prepare(self, begin: BeginUpdate, source: WeightSource) -> BeginUpdate:
        """The update to announce: `begin` itself, unless a transport sends only a part."""
        return begin

    @abstractmethod
    def carry(self, begin: BeginUpdate, source: WeightSource) -> None:
        """Bring every tensor of the manifest to every target; their update is open."""

    @abstractmethod
    def close(self) -> None:
        """Leave the engines. Idempotent."""


def publish(carrier: Carrier, begin: BeginUpdate, source: WeightSource) -> UpdateReport:
    """One transaction: begin on every engine, carry, commit on every engine.

    Whatever fails before the first commit aborts the update on all of them, and the error is
    raised on: they serve the old version. Returns the first engine's report.
    """
    targets = carrier.targets
    begin = carrier.prepare(begin, source)
    committed = False
    try:
        on_each(targets, lambda target: target.send(begin))
        carrier.carry(begin, source)
        commit = CommitUpdate(version=begin.version)
        replies = on_each(targets, lambda target: target.send(commit))
        committed = True
    finally:
        if not committed:
            give_up(targets, begin.version)
    carrier.published = begin
    return report_of(replies)


def on_each(targets: Sequence[UpdateTarget], call: Callable[[UpdateTarget], T]) -> list[T]:
    """Call for every target at once, each in a thread of its own; results in their order.

    Waits for all, then raises the first error, if any.
    """
    if len(targets) < 2:
        return [call(target) for target in targets]
    with ThreadPoolExecutor(len(targets)) as pool:
        futures = [pool.submit(call, target) for target in targets]
    return [future.result() for future in futures]


def give_up(targets: Sequence[UpdateTarget], version: int) -> None:
    """Abort the update wherever it is open, without hiding the error that led here."""
    for target in targets:
        try_send(target, AbortUpdate(version=version))


def report_of(replies: Sequence[Reply]) -> UpdateReport:
    """The report of the first engine's commit."""
    report = replies[0].report
    assert report is not None, "a commit must report what it moved"
    return report
