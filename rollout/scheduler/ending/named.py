"""Which of many requests a command names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rollout.requests.sample_ids import of_sample, starts_with
from rollout.scheduler.sequence import Sequence


def named_sequences(
    requests: Mapping[str, Sequence], *, rid: str, rid_prefix: str, rids: Iterable[str]
) -> list[Sequence]:
    """The sequences of `requests`, by id, that `Scheduler.abort` is told of. rid, rid_prefix: as
    replies show ids too; rids: as they are. In the order of `requests` where there is a prefix."""
    if rid_prefix:
        exact = frozenset((rid, *rids))
        return [
            sequence
            for own, sequence in requests.items()
            if own in exact or starts_with(own, rid_prefix)
        ]
    # A client that leaves ends one of thousands: no scan for that.
    first = rid if rid in requests else of_sample(rid)
    found = (requests.get(name) for name in dict.fromkeys((first, *rids)))
    return [sequence for sequence in found if sequence is not None]
