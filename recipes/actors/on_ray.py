"""Engines of a run on a Ray cluster: a router here, and servers that Ray places behind it."""

from __future__ import annotations

import secrets
from contextlib import ExitStack

from engine.errors import InvalidRequest
from recipes.actors.engines import Engines
from recipes.actors.routed import RoutedEngines
from recipes.actors.router_child import RouterChild
from recipes.actors.serve_command import serve_command
from recipes.settings.options import RunOptions
from recipes.world import uses_gpu
from rollout.replica.remote.http_replica import HttpReplica


def open_on_ray(options: RunOptions) -> tuple[Engines, str]:
    """Start them; the engines, and the URL of one. They end with the engines' `close`.

    Raises InvalidRequest (`launch`) without Ray, EngineDead (`endpoint`) if no server has come
    within `endpoint_patience`.
    """
    try:
        from recipes.actors.ray_fleet import RayFleet, node_address
    except ImportError as error:
        raise InvalidRequest(
            f"launch: --launch ray needs the ray package ({error}): pip install -e '.[ray]'",
            field="launch",
        ) from error
    placement, patience_s = options.placement, options.endpoints.endpoint_patience
    tp, key = options.endpoints.rollout_tp, secrets.token_hex(16)
    with ExitStack() as at_end:
        host = node_address()
        router = RouterChild(host, admin_key=key, start_s=patience_s)
        at_end.callback(router.close)
        fleet = RayFleet(
            serve_command(options, router=router.url, trainer=host, admin_key=key),
            count=placement.rollout_gpus // tp,
            num_gpus=tp if uses_gpu(options.device) else 0,
        )
        at_end.callback(fleet.close)
        replica = HttpReplica(router.url, admin_api_key=key)
        at_end.callback(replica.close)
        engines = RoutedEngines(
            replica, admin_key=key, patience_s=patience_s, count=placement.rollout_gpus // tp
        )
        engines.at_end = at_end.pop_all()
    return engines, engines.workers[0].url
