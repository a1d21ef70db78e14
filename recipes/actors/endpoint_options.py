"""Which servers roll out, where a run has no engine of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EndpointOptions:
    """Servers, or a router before them, that roll out and take the weights of every step. Their
    keys are those of SLIPSTREAM_API_KEY and SLIPSTREAM_ADMIN_API_KEY in the environment."""

    endpoint: tuple[str, ...] = ()
    """URL of a router (`python -m rollout router`), or of servers, which roll out in place of
    engines of the run's own."""
    endpoint_patience: float = 600.0
    """Seconds to wait for an endpoint that does not answer, or has no worker, before the run
    ends."""
    launch: Literal["here", "ray"] = "here"
    """Where the engines of --rollout-gpus are: on this machine, or on a Ray cluster, each where Ray
    finds room, and anew when its node is lost."""
    rollout_tp: int = 1
    """GPUs that share the model in each engine, with --launch ray."""
    rendezvous_host: str | None = None
    """Name or address at which the endpoints' engines meet this machine for its weights; None is
    the address on the way to them."""
