"""The routers of the model that learns, in the passes of its trainer: replayed, counted, balanced.

A hook behind every router sees its logits and its choice of each forward pass, and may put another
choice in its place. `recipes/trainers/routers.py` has the classes of routers that it knows.

Legend: T nodes of a micro-batch's tree, E experts, K experts of a token, L layers with experts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from recipes.trainers.balance import LoadArray, balance_loss, load_of
from recipes.trainers.prefix_tree import PrefixTree, PromptResponse
from recipes.trainers.replay import RouteReplay
from recipes.trainers.route_shelf import RouteShelf
from recipes.trainers.routers import Router, routers_of
from recipes.trainers.routing_options import (
    RoutingOptions,
    asked_of_routers,
    without_routers,
)
from recipes.types import Trajectory


@dataclass(frozen=True, kw_only=True)
class RoutingCounts:
    """What the routers did, over micro-batches.

    load: int64 [L, E], choices that each expert got. replayed, flips, absent: tokens times layers
    that had a route, that the router itself would have sent to other experts than that, and that
    had none. aux_loss: of updates, before its coefficient.
    """

    load: LoadArray
    replayed: int = 0
    flips: int = 0
    absent: int = 0
    aux_loss: float = 0.0

    def __add__(self, other: RoutingCounts) -> RoutingCounts:
        return RoutingCounts(
            load=self.load + other.load,
            replayed=self.replayed + other.replayed,
            flips=self.flips + other.flips,
            absent=self.absent + other.absent,
            aux_loss=self.aux_loss + other.aux_loss,
        )


class Routing:
    """The routers of one model; of a dense model it does nothing.

    model: before it is sharded. shelf: where routes are that are to be replayed. Raises
    InvalidRequest naming the option for one that a model without routers, or with routers of an
    unknown class, cannot follow.
    """

    def __init__(self, model: Any, options: RoutingOptions, shelf: RouteShelf) -> None:
        self._routers = routers_of(model)
        asked = asked_of_routers(options)
        if asked and not self._routers:
            raise without_routers(asked, type(model).__name__)
        self._aux_coef = options.router_aux_coef
        self._shelf = shelf
        self._replay: RouteReplay | None = None
        self._logits: dict[int, torch.Tensor] = {}
        self._chosen: dict[int, torch.Tensor] = {}
        self._aux_loss = 0.0
        if options.routing_replay:
            first = self._routers[0]
            self._replay = RouteReplay(
                [router.layer for router in self._routers],
                num_layers=model.config.num_hidden_layers,
                num_experts=first.num_experts,
                top_k=first.module.top_k,
            )
        for router in self._routers:
            if options.freeze_router:
                router.module.weight.requires_grad_(False)
            router.module.register_forward_hook(functools.partial(self._route, router))

    def sequence(self, trajectory: Trajectory) -> PromptResponse:
        """A trajectory as it is packed, with its routes if they are replayed. Raises
        InvalidRequest for routes of another model."""
        routes = None
        if self._replay is not None and trajectory.routes is not None:
            routes = self._shelf.get(trajectory.routes)
            num = len(trajectory.prompt_ids) + len(trajectory.response_ids) - 1
            self._replay.require_fit(routes, num)
        return PromptResponse(
            prompt_ids=trajectory.prompt_ids, response_ids=trajectory.response_ids, routes=routes
        )

    def fetch(self, shares: Sequence[Sequence[Trajectory]]) -> None:
        """Bring the routes of `shares[rank]` to that process; collective, with equal arguments."""
        if self._replay is not None:
            self._shelf.fetch([[t.routes for t in share] for share in shares])

    def begin(self, tree: PrefixTree) -> None:
        """What follows is the forward pass over this tree."""
        self._logits, self._chosen, self._aux_loss = {}, {}, 0.0
        if self._replay is not None:
            self._replay.begin(tree.routes)

    def _route(self, router: Router, module: Any, args: Any, output: Any) -> Any:
        """Behind a router: (logits [T, E], weights [T, K], ids int64 [T, K]), or None to leave
        them. Runs again where a layer is recomputed, which changes nothing that was noted."""
        logits_TE, _, own_TK = output
        replayed = None
        if self._replay is not None:
            replayed = self._replay.choose(router.layer, own_TK)
        if router.layer not in self._chosen:
            self._chosen[router.layer] = own_TK if replayed is None else replayed
            if self._aux_coef > 0 and torch.is_grad_enabled():
                self._logits[router.layer] = logits_TE
        if replayed is None:
            return None
        return logits_TE, router.weigh(module, logits_TE, replayed), replayed

    def aux_loss(self, share: float) -> torch.Tensor | float:
        """The weighted balance loss of the pass, mean over layers, times `share`: of the update
        that this micro-batch is. 0 where there is none."""
        if not self._logits:
            return 0.0
        losses = [
            balance_loss(router.shares(self._logits[router.layer]), self._chosen[router.layer])
            for router in self._routers
        ]
        mean = torch.stack(losses).mean()
        self._logits = {}
        self._aux_loss = share * float(mean.detach())
        return self._aux_coef * share * mean

    def counts(self) -> RoutingCounts | None:
        """Of the pass since `begin`; None of a dense model."""
        if not self._routers:
            return None
        loads = [load_of(self._chosen[r.layer], r.num_experts) for r in self._routers]
        replayed, flips, absent = (0, 0, 0) if self._replay is None else self._replay.counts()
        return RoutingCounts(
            load=torch.stack(loads).cpu().numpy(),
            replayed=replayed,
            flips=flips,
            absent=absent,
            aux_loss=self._aux_loss,
        )


def length_share(part: Sequence[Trajectory], whole: Sequence[Trajectory]) -> float:
    """Which share of the response tokens of an update a micro-batch has."""
    total = sum(len(t.response_ids) for t in whole)
    return sum(len(t.response_ids) for t in part) / max(total, 1)
