"""Options of a mixture of experts: its routers while it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRequest

_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """What becomes of the routers of a mixture of experts."""

    freeze_router: bool = False
    """Leave the weights of routers as they are; everything else learns."""
    router_aux_coef: float = 0.0
    """Weight of a loss that spreads tokens evenly over experts (arXiv 2101.03961): 1 where they
    are, up to the number of experts where one takes all. 0.001 is usual."""


@dataclass(frozen=True, kw_only=True)
class RoutingOptions(RouterOptions):
    """The same, of a run that learns from what an engine samples."""

    routing_replay: bool = False
    """Train on the experts that the engine sent each token to, not on the trainer's own choice
    (R3, arXiv 2510.11370)."""


def asked_of_routers(options: RouterOptions) -> str:
    """The first option that was given and needs routers; "" for none."""
    replays = isinstance(options, RoutingOptions) and options.routing_replay
    given = {
        "routing_replay": replays,
        "freeze_router": options.freeze_router,
        "router_aux_coef": options.router_aux_coef > 0,
    }
    return next((name for name, value in given.items() if value), "")


def check_routers(options: RouterOptions, hf_config: Mapping[str, Any]) -> None:
    """Raise InvalidRequest naming an option of routers that was given for a dense model.

    hf_config: the contents of the model's config.json."""
    asked = asked_of_routers(options)
    if asked and not any(hf_config.get(key) for key in _NUM_EXPERTS):
        raise without_routers(asked, str(hf_config["architectures"][0]))


def without_routers(asked: str, architecture: str) -> InvalidRequest:
    """The error for an option of routers where there are none that can follow it."""
    return InvalidRequest(
        f"{asked}: {architecture} has no routers that a trainer knows; leave "
        f"--{asked.replace('_', '-')} out, or train a mixture of experts",
        field=asked,
    )
