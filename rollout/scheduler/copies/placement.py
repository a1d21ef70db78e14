"""Which copy of the model takes a request: the one with least KV promised to others, less what it
has of the request's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.protocol import Request, RequestOutput
from rollout.scheduler.emit import StepOutput
from rollout.scheduler.scheduler import Scheduler


@dataclass
class _Group:
    """The members of a group that are in some queue or running, all on one copy."""

    copy: int
    num_members: int = 0


@dataclass(frozen=True)
class _Placed:
    """promised: tokens whose KV the request may come to hold."""

    copy: int
    group: str
    promised: int


class Placement:
    """Remembers where each request is until its last output was seen.

    Requests of a group share the KV of their prompt, so they stay on one copy while any of them
    is there. So does the next turn of a session, where the session's KV is. Any other goes where
    the KV promised to requests, less what is cached there of its own prompt, is least; so requests
    that come all at once are spread, and those with a cached prefix go to it unless the queue there
    is longer by more than that prefix.
    """

    def __init__(self, copies: Sequence[Scheduler], *, kv_tokens: int) -> None:
        """kv_tokens: that the pool of a copy holds."""
        self._copies = copies
        self._kv_tokens = kv_tokens
        self._placed: dict[str, _Placed] = {}
        self._groups: dict[str, _Group] = {}
        self._promised = [0] * len(copies)

    def __contains__(self, rid: str) -> bool:
        return rid in self._placed

    def __len__(self) -> int:
        return len(self._placed)

    def copy_of(self, rid: str) -> int:
        """Where the request is; raises KeyError for one that is nowhere."""
        return self._placed[rid].copy

    def choose(self, request: Request) -> int:
        """The copy that is to take `request`, an index."""
        group = self._groups.get(request.group) if request.group else None
        if group is not None:
            return group.copy
        if request.session:
            for index, copy in enumerate(self._copies):
                if copy.running.cache.idle.num_tokens(request.session):
                    return index
        costs = [
            promised - _num_cached(copy, request)
            for promised, copy in zip(self._promised, self._copies, strict=True)
        ]
        return costs.index(min(costs))

    def enter(self, request: Request, copy: int) -> None:
        """The request was queued there."""
        promised = request.sampling.max_new_tokens
        if request.group:
            group = self._groups.setdefault(request.group, _Group(copy))
            group.num_members += 1
        if not request.group or group.num_members == 1:
            promised += len(request.prompt_ids)
        promised = min(promised, self._kv_tokens)
        self._promised[copy] += promised
        self._placed[request.rid] = _Placed(copy, request.group, promised)

    def leave(self, outputs: Iterable[StepOutput]) -> None:
        """Forget the requests whose last output is among these."""
        for output in outputs:
            if not isinstance(output, RequestOutput) or output.finish is None:
                continue
            placed = self._placed.pop(output.rid, None)
            if placed is None:
                continue
            self._promised[placed.copy] -= placed.promised
            if placed.group:
                group = self._groups[placed.group]
                group.num_members -= 1
                if not group.num_members:
                    del self._groups[placed.group]

    def check_integrity(self) -> None:
        """Assert that what is promised and who is grouped follow from the requests placed."""
        placed = self._placed.values()
        for copy, promised in enumerate(self._promised):
            assert promised == sum(p.promised for p in placed if p.copy == copy), "KV is misjudged"
        for name, group in self._groups.items():
            members = [p for p in placed if p.group == name]
            assert len(members) == group.num_members, f"group {name} lost a request"
            assert {p.copy for p in members} == {group.copy}, f"group {name} is divided"


def _num_cached(copy: Scheduler, request: Request) -> int:
    """Tokens of its prompt whose KV a copy has."""
    tokens = request.prompt_ids
    return copy.running.cache.match_length(
        tokens, len(tokens), version=copy.version, salt=request.salt
    )
