"""Options of a mixture of experts: its routers while it is trained."""

from __future__ import annotations

from dataclasses import dataclass


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
