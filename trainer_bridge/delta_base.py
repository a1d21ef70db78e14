"""What a delta is made against, and whether every engine still holds just that.

A version is a number. An engine that was started again, or that another trainer fed, may give
the same number to other weights, and a delta on top of those would be a mixture that nothing
notices. So each engine is asked for the checksums of its weights once after a commit and once
before the next delta; a carrier sends a delta only where the two answers agree. Each answer
costs the engine one pass over its weights where they lie, between two steps.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from engine.errors import SlipstreamError
from engine.protocol import BeginUpdate, CheckWeights, TensorSpec
from trainer_bridge.fleet import Member, on_each

logger = logging.getLogger(__name__)

_Stored = list[dict[str, int]]
"""Checksums of the weights as an engine stores them, by rank and by name. Compared with those of
the same engine alone, so its dtype, its ranks and its quantisation may be any."""


class DeltaBase:
    """The last version that a carrier published: owned by any carrier that sends changes only."""

    def __init__(self) -> None:
        self.version: int | None = None
        self._sent: dict[str, int | None] = {}
        self._stored: dict[int, _Stored] = {}

    def changed(self, specs: Iterable[TensorSpec]) -> list[TensorSpec]:
        """The tensors, given with their checksums, that are not as they were last published."""
        return [spec for spec in specs if self._sent.get(spec.name) != spec.checksum]

    def missing_from(self, members: Sequence[Member]) -> str:
        """Why a delta would be wrong for one of the engines, which is named; "" if for none.

        Called once for every update. An engine that does not say what it holds is a reason.
        """
        version = self.version
        if version is None:
            return "nothing was published before"
        for member in members:
            if member.state.refusal:
                return f"{_name(member)} serves nothing ({member.state.refusal})"
            if not member.serves(version):
                return f"{_name(member)} serves version {member.state.version}, not {version}"
            if id(member.target) not in self._stored:
                return f"nobody knows what {_name(member)} held once it served version {version}"
        for member, now in zip(members, on_each(members, _stored), strict=True):
            if isinstance(now, SlipstreamError):
                return f"{_name(member)} does not say what it holds ({now.message})"
            tensor = _difference(self._stored[id(member.target)], now)
            if tensor:
                return (
                    f"{_name(member)} serves version {version} with other weights than were "
                    f"published ({tensor} differs)"
                )
        return ""

    def committed(self, begin: BeginUpdate, members: Sequence[Member]) -> None:
        """`begin`, whose manifest has checksums, is what the engines serve. members: those that
        took it in this update; what the others hold, nobody has seen."""
        sums = {spec.name: spec.checksum for spec in begin.manifest}
        self._sent = self._sent | sums if begin.partial else sums
        self.version = begin.version
        self._stored = {}
        for member, stored in zip(members, on_each(members, _stored), strict=True):
            if isinstance(stored, SlipstreamError):
                # The update is committed all the same.
                logger.warning("%s does not say what it holds: %s", _name(member), stored)
            else:
                self._stored[id(member.target)] = stored


def _stored(member: Member) -> _Stored | SlipstreamError:
    try:
        return [report.checksums for report in member.send(CheckWeights()).weights]
    except SlipstreamError as error:
        return error


def _difference(before: _Stored, now: _Stored) -> str:
    """A tensor that is not as it was, "" if none is."""
    if len(before) != len(now):
        return f"the number of ranks, {len(before)} and {len(now)},"
    for old, new in zip(before, now, strict=True):
        names = [name for name in old | new if old.get(name) != new.get(name)]
        if names:
            return names[0]
    return ""


def _name(member: Member) -> str:
    return member.name or "the engine"
