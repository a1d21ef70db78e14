"""The worker of a session.

It is that of the greatest hash of key and worker (rendezvous hashing: Thaler and Ravishankar,
1998), passed over while it has more than 1.25 times the mean load (bounded loads: Mirrokni, Thorup
and Zadimoghaddam, 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from itertools import repeat

from rollout.router.choice.ask import Candidate

_BOUND = 1.25
_SLACK = 4.0


def of_session(key: bytes, marks: Sequence[int], candidates: Sequence[Candidate]) -> int:
    """Place of the worker that a session has. marks: of the candidates, by place."""
    most = _BOUND * sum(worker.num_open for worker in candidates) / len(candidates) + _SLACK
    # Of whole numbers, whose hash has no seed: every router finds the same worker.
    weights = list(map(hash, zip(repeat(mark(key)), marks)))
    first = weights.index(max(weights))
    if candidates[first].num_open <= most:
        return first
    order = sorted(range(len(weights)), key=weights.__getitem__, reverse=True)
    return next((at for at in order if candidates[at].num_open <= most), first)


def mark(name: bytes) -> int:
    """56 bits of a name, the same in every router."""
    return int.from_bytes(blake2b(name, digest_size=7).digest())
