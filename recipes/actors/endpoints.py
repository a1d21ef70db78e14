"""The servers of `--endpoint`, looked at before a run uses them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from engine.errors import InvalidRequest, SlipstreamError
from engine.protocol.urls import address_towards
from recipes.actors.endpoint_check import check_served
from recipes.actors.engines import Engines, ReplicaEngines
from recipes.actors.fleet import FleetActor
from recipes.actors.routed import RoutedEngines
from recipes.settings.options import RunOptions
from recipes.world import World
from rollout.replica.remote.http_replica import HttpReplica

API_KEY, ADMIN_API_KEY = "SLIPSTREAM_API_KEY", "SLIPSTREAM_ADMIN_API_KEY"
"""Variables of the environment with the keys of endpoints; a command line ends up in a run's
files."""


Opened = Callable[[RunOptions], tuple[Engines, str]]
"""Has the engines of a run there; they, and the URL of one. Called in the main process."""


def open_fleet(
    opened: Opened, options: RunOptions, world: World, *, device: torch.device
) -> FleetActor:
    """The actor over what `opened` gives; collective. Every process raises what it raises.

    device: where the trainer's tensors are.
    """
    engines: Engines | None = None
    failure: SlipstreamError | None = None
    reached: tuple[str, str] = ("", "")
    if world.is_main:
        try:
            engines, there = opened(options)
            reached = (there, f"run-{uuid.uuid4().hex}")
        except SlipstreamError as error:
            failure = error
    failure, (there, group) = world.from_main((failure, reached))
    if failure is not None:
        raise failure
    address = options.endpoints.rendezvous_host or address_towards(there) or "127.0.0.1"
    return FleetActor(engines, world, device=device, address=address, group=group)


def open_endpoints(options: RunOptions) -> tuple[Engines, str]:
    """The engines of the endpoints, and the URL of one.

    Raises InvalidRequest (`endpoint`, `dtype`, `routing_replay`) for endpoints that do not serve
    what is trained, EngineDead (`endpoint`) for one that does not answer within
    `endpoint_patience`, Unauthorized and Forbidden.
    """
    given = options.endpoints
    with ExitStack() as on_failure:
        replicas = [_reach(url, given.endpoint_patience) for url in given.endpoint]
        for replica in replicas:
            on_failure.callback(replica.close)
        routers = [replica for replica in replicas if _is_router(replica)]
        if routers and len(replicas) > 1:
            raise InvalidRequest(
                f"endpoint: {routers[0].url} is a router, and stands for all its workers; give it "
                "alone",
                field="endpoint",
            )
        found = _routed(options, routers[0]) if routers else _alone(options, replicas)
        on_failure.pop_all()
    return found


def _routed(options: RunOptions, router: HttpReplica) -> tuple[Engines, str]:
    key = os.environ.get(ADMIN_API_KEY) or os.environ.get(API_KEY, "")
    patience_s = options.endpoints.endpoint_patience
    engines = RoutedEngines(router, admin_key=key, patience_s=patience_s)
    check_served(options, router.url, engines.state())
    return engines, engines.workers[0].url


def _alone(options: RunOptions, replicas: Sequence[HttpReplica]) -> tuple[Engines, str]:
    given = options.endpoints
    states = [replica.state() for replica in replicas]
    for replica, state in zip(replicas, states, strict=True):
        check_served(options, replica.url, state)

    def again(place: int) -> HttpReplica:
        return _reach(given.endpoint[place], given.endpoint_patience)

    base = max(state.version for state in states) + 1
    return ReplicaEngines(replicas, again, base=base), replicas[0].url


def _reach(url: str, patience_s: float) -> HttpReplica:
    """The endpoint once it is healthy. Raises EngineDead (`endpoint`) if it is not in time."""
    replica = HttpReplica(
        url,
        api_key=os.environ.get(API_KEY, ""),
        admin_api_key=os.environ.get(ADMIN_API_KEY, ""),
    )
    with ExitStack() as on_failure:
        on_failure.callback(replica.close)
        try:
            replica.client.wait_ready(patience_s)
        except SlipstreamError as error:
            raise type(error)(
                f"endpoint: {url} is not ready for {patience_s:g} s (--endpoint-patience): "
                f"{error.message}",
                field="endpoint",
            ) from error
        on_failure.pop_all()
    return replica


def _is_router(replica: HttpReplica) -> bool:
    """Whether the endpoint has workers; a server has no such route."""
    try:
        found: Any = replica.client.call("/workers")
    except SlipstreamError as error:
        if error.status in (401, 403, 503):
            raise type(error)(f"endpoint: {error.message}", field="endpoint") from error
        return False
    return isinstance(found, dict) and "workers" in found
