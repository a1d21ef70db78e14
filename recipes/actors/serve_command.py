"""The server of a run's engine on another machine, as the run's options name it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from recipes.settings.options import RunOptions

Command = Callable[[str], Sequence[str]]
"""From the address of the node that it runs on to the command of a server."""


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
