"""Routes as replies have them, in SGLang's form and in vLLM's, and back."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.protocol import RequestOutput, RouteArray, RouteDType

ROUTES = "routed_experts"
Ids = np.ndarray[Any, np.dtype[np.integer[Any]]]
_NO_ID = -1


def route_meta(output: RequestOutput, dtype: RouteDType) -> dict[str, Any]:
    """SGLang's `meta_info` of a final output: base64 of row-major ids, and beside it their dtype,
    their shape and the position of the first; nothing where the output has no routes."""
    if output.routed_experts is None:
        return {}
    return {
        **encoded_routes(output.routed_experts, dtype),
        f"{ROUTES}_start_len": output.routed_experts_start,
    }


def encoded_routes(routes: RouteArray, dtype: str) -> dict[str, Any]:
    """The ids in base64, their dtype and their shape."""
    return _encoded(_as(routes, dtype))


def _encoded(ids: Ids) -> dict[str, Any]:
    return {
        ROUTES: base64.b64encode(ids.tobytes()).decode(),
        f"{ROUTES}_dtype": ids.dtype.name,
        f"{ROUTES}_shape": list(ids.shape),
    }


def decoded_routes(fields: Mapping[str, Any]) -> Ids | None:
    """What `route_meta` or `encoded_routes` wrote, [positions, layers, experts of a token] in the
    dtype that was sent; None where it wrote nothing."""
    if fields.get(ROUTES) is None:
        return None
    ids = np.frombuffer(base64.b64decode(fields[ROUTES]), np.dtype(fields[f"{ROUTES}_dtype"]))
    found: Ids = ids.reshape(fields[f"{ROUTES}_shape"])
    return found


def npy_routes(output: RequestOutput, start: int) -> str | None:
    """vLLM's `routed_experts` of a choice, from position `start` on: base64 of what `numpy.save`
    writes; None where the output has no routes. It may have more of them, where its call is
    recorded."""
    if output.routed_experts is None:
        return None
    file = io.BytesIO()
    np.save(file, output.routed_experts[start - output.routed_experts_start :])
    return base64.b64encode(file.getvalue()).decode()


def joined_route_meta(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`route_meta` of a reply from those of its parts: of each token the route that the part had
    that sampled the token behind it. Nothing unless all parts have routes without a gap."""
    whole: Ids | None = None
    first = 0
    for meta in parts:
        routes, start = decoded_routes(meta), meta.get(f"{ROUTES}_start_len", 0)
        if routes is None or (whole is not None and start > first + len(whole)):
            return {}
        if whole is None:
            whole, first = routes, start
        else:
            # A stop may have cut off the last tokens of the parts before.
            whole = whole[: max(start + len(routes) - first, 0)]
            whole = np.concatenate((whole, routes[first + len(whole) - start :]))
    return {} if whole is None else {**_encoded(whole), f"{ROUTES}_start_len": first}


def next_start(replies: Sequence[Mapping[str, Any]]) -> int:
    """The first position whose route some of these `meta_info`s lack; 0 if one has none at all."""
    ends = [
        meta[f"{ROUTES}_start_len"] + meta[f"{ROUTES}_shape"][0] if meta.get(ROUTES) else 0
        for meta in replies
    ]
    return min(ends, default=0)


def _as(routes: RouteArray, dtype: str) -> Ids:
    """Ids in a dtype that holds them, with its own mark of absent routes."""
    wanted = np.dtype(dtype)
    if wanted == routes.dtype:
        return routes
    found = routes.astype(wanted)
    mark = _NO_ID if wanted.kind == "i" else np.iinfo(wanted).max
    found[routes == np.iinfo(routes.dtype).max] = mark
    return found
