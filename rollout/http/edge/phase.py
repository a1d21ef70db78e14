"""Two phases of an update over several servers: all of them verify it, and then all commit.

A call with the header `HEADER: prepare` that would commit an update verifies it and leaves it open;
`rollout.http.native.phase_routes` has what follows.
"""

from __future__ import annotations

from fastapi import Request

HEADER = "x-slipstream-phase"
PREPARE = "prepare"


def holds(request: Request) -> bool:
    """Whether a call is the first of two phases."""
    return request.headers.get(HEADER) == PREPARE
