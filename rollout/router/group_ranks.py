"""Several replicas in one process group: each gets ranks of its own.

A trainer tells its group's size and the first rank of the engines; behind a router these are ranks
of several engines, one after the other in the order in which they registered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from engine.errors import InvalidRequest
from rollout.requests.json_types import decode_json
from rollout.router.workers.worker import Worker

_JOINS = frozenset({"/init_weights_update_group", "/init_weight_transfer_engine", "/command"})


def bodies(path: str, body: bytes, workers: Sequence[Worker]) -> list[bytes]:
    """What each worker gets of a call: the same, but for the first rank of one that joins a group.

    Raises InvalidRequest (`world_size`), before anybody joins, for a group that has not as many
    ranks as the workers.
    """
    if path not in _JOINS:
        return [body] * len(workers)
    whole = decode_json(body or b"{}", dict[str, Any])
    if path == "/command" and whole.get("type") != "join_group":
        return [body] * len(workers)
    inner = whole.get("init_info") if path == "/init_weight_transfer_engine" else whole
    if not isinstance(inner, dict):
        return [body] * len(workers)
    base, size = inner.get("rank_offset", 1), inner.get("world_size")
    if not isinstance(base, int) or not isinstance(size, int):
        # A worker names the field.
        return [body] * len(workers)
    wanted = base + sum(worker.facts.num_ranks for worker in workers)
    if size != wanted:
        raise InvalidRequest(
            f"world_size is {size}, and {base} ranks of the trainer and those of {len(workers)} "
            f"workers are {wanted}; ask GET /get_world_size for the workers' own",
            field="world_size",
        )
    found = []
    for worker in workers:
        changed = {**inner, "rank_offset": base}
        sent = changed if inner is whole else {**whole, "init_info": changed}
        found.append(msgspec.json.encode(sent))
        base += worker.facts.num_ranks
    return found
