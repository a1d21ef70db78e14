"""Engines of a run on a Ray cluster: a router here, and servers that Ray places behind it."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from engine.errors import InvalidRequest
from recipes.actors.engines import Engines
from recipes.actors.routed import RoutedEngines
from recipes.actors.router_child import RouterChild
from recipes.settings.options import RunOptions
from recipes.world import uses_gpu
from rollout.replica.remote.http_replica import HttpReplica

if TYPE_CHECKING:
    from recipes.actors.ray_fleet import Command


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


def serve_command(options: RunOptions, *, router: str, trainer: str, admin_key: str) -> Command:
    """From a node's address to the command of a server there, as the options name its engine.
    trainer: the address at which engines meet the trainer."""
    rollout = options.rollout
    words = {
        "model": options.model,
        "load-format": options.load_format,
        "device": options.device,
        "dtype": options.dtype,
        "seed": str(options.seed),
        "tp": str(options.endpoints.rollout_tp),
        "kv-memory": str(rollout.kv_memory_gb),
        "quantization": rollout.rollout_quantization,
        "speculative": rollout.speculative,
        "draft-tokens": str(rollout.draft_tokens),
        "router": router,
        "rendezvous-host": options.endpoints.rendezvous_host or trainer,
        "admin-api-key": admin_key,
        "port": "0",
    }
    flags = [word for name, value in words.items() for word in (f"--{name}", value)]
    if options.routing.routing_replay:
        flags.append("--enable-return-routed-experts")

    def command(node: str) -> Sequence[str]:
        return [sys.executable, "-P", "-m", "rollout", "serve", "--host", node, *flags]

    return command
