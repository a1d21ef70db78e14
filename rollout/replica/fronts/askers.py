"""Which caller of a leader asked for which request."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.protocol import IntArray, RequestOutput, TokenRows
from rollout.replica.columns import taken_rows
from rollout.requests.sample_ids import in_group, of_sample

OWNER = ""
"""The name of the caller that started the leader; the others have longer ones."""


def channel_name(front: str, number: int) -> str:
    """The name by which a leader knows a front that has joined `number` leaders so far."""
    return f"{front}/{number}"


def front_of(name: str) -> str:
    """The front that a caller is."""
    return name.partition("/")[0]


@dataclass
class _Asker:
    """count: requests of this id whose final output has not come. A caller may send the next one
    of an id once it has aborted the one before."""

    name: str
    count: int = 1


class Askers:
    """Every request that a leader has, until its final output was sent."""

    def __init__(self) -> None:
        self._open: dict[str, _Asker] = {}
        self._rids: list[str] = []
        self._places: list[tuple[str, IntArray]] = []
        """Whose the rows of columns with the ids `_rids` are; most often those of the next, too."""

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, name: str, rid: str) -> bool:
        """Note a request of the caller `name`; False, with nothing noted, if the id is in use by
        another caller. An id that its own caller uses twice is the scheduler's to refuse."""
        found = self._open.get(rid)
        if found is None:
            self._open[rid] = _Asker(name)
            self._rids = []
        elif found.name == name:
            found.count += 1
        return found is None or found.name == name

    def take(self, output: RequestOutput) -> str:
        """Whom an output goes to; the request is forgotten with its final one."""
        found = self._open.get(output.rid)
        if found is None:
            return OWNER
        if output.finish is not None:
            found.count -= 1
            if not found.count:
                del self._open[output.rid]
        return found.name

    def parts(self, rows: TokenRows) -> list[tuple[str, TokenRows]]:
        """Whom the rows of columns go to, each caller with its own."""
        if rows.rids != self._rids:
            at: dict[str, list[int]] = {}
            for i, rid in enumerate(rows.rids):
                found = self._open.get(rid)
                at.setdefault(OWNER if found is None else found.name, []).append(i)
            self._rids = rows.rids
            self._places = [(name, np.array(some, np.int32)) for name, some in at.items()]
        return [(name, taken_rows(rows, some)) for name, some in self._places]

    def of_front(self, front: str) -> list[str]:
        """The ids of one front's requests, in the order in which they came."""
        return [rid for rid, asker in self._open.items() if front_of(asker.name) == front]

    def named(self, text: str) -> list[str]:
        """The ids that a client means by `text`, as replies show ids: one request, or one sample,
        or every sample of a call."""
        for rid in (text, of_sample(text)):
            if rid in self._open:
                return [rid]
        return [rid for rid in self._open if in_group(rid, text)]
