"""Rollout routing replay, R3: tokens go to the experts they went to when they were sampled.

Engine and trainer differ in the last bits of a router's logits, and where two experts are almost
equal they choose differently; the log-probabilities of whole replies then differ by far more than
the bits did. Replaying the engine's choice removes that: the logits, and so the gradient, are the
trainer's own; the ids are the engine's. Ma et al., "Stabilizing MoE Reinforcement Learning by
Aligning Training and Inference Routers", arXiv 2510.11370.

Legend: T nodes of a micro-batch's tree, L decoder layers, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.errors import InvalidRequest
from engine.protocol import RouteArray


class RouteReplay:
    """What the routers of a model choose in one micro-batch, and how often they would have chosen
    otherwise.

    layers: indices of those with experts, of `num_layers` in all.
    """

    def __init__(
        self, layers: Sequence[int], *, num_layers: int, num_experts: int, top_k: int
    ) -> None:
        self._layers = list(layers)
        self._num_layers = num_layers
        self._num_experts = num_experts
        self._top_k = top_k
        self._ids: dict[int, torch.Tensor] = {}
        self._absent: dict[int, torch.Tensor] = {}
        self._flips: dict[int, torch.Tensor] = {}

    def require_fit(self, routes_TLK: RouteArray, num_positions: int) -> None:
        """Raise InvalidRequest (`routed_experts`) for routes that this model cannot have chosen,
        or that are of another sequence."""
        wanted = (num_positions, self._num_layers, self._top_k)
        for what, found, expected in zip(
            ("positions", "layers", "experts a token"), routes_TLK.shape, wanted, strict=True
        ):
            if found != expected:
                raise _unfit(f"have {found} {what} where the trainer's model has {expected}")
        absent = np.iinfo(routes_TLK.dtype).max
        sparse = routes_TLK[:, self._layers]
        if (sparse[sparse != absent] >= self._num_experts).any():
            most = int(sparse[sparse != absent].max())
            raise _unfit(f"name expert {most} where the trainer's model has {self._num_experts}")

    def begin(self, routes_TLK: RouteArray | None) -> None:
        """Set the routes of the next micro-batch: they stay until the next call, since recomputed
        layers ask again in the backward pass. None lets routers choose. They stay in host memory
        as they are; each router takes its own layer to its device when it is asked."""
        self._ids, self._absent, self._flips = {}, {}, {}
        if routes_TLK is None:
            return
        largest = np.iinfo(routes_TLK.dtype).max
        for layer in self._layers:
            rows_TK = np.ascontiguousarray(routes_TLK[:, layer])
            self._ids[layer] = torch.from_numpy(rows_TK)
            self._absent[layer] = torch.from_numpy((rows_TK == largest).any(axis=1))

    def choose(self, layer: int, own_TK: torch.Tensor) -> torch.Tensor | None:
        """The ids that are replayed, int64 [T, K], the router's own where there is no route; None
        where nothing is replayed."""
        if layer not in self._ids:
            return None
        ids_TK = self._ids[layer].to(own_TK.device, non_blocking=True).long()
        absent_T = self._absent[layer].to(own_TK.device, non_blocking=True)
        ids_TK = torch.where(absent_T[:, None], own_TK, ids_TK)
        if layer not in self._flips:
            differs_T = (ids_TK.sort(dim=1).values != own_TK.sort(dim=1).values).any(dim=1)
            self._flips[layer] = differs_T.sum()
        return ids_TK

    def counts(self) -> tuple[int, int, int]:
        """Of the micro-batch, over tokens and layers with experts: how many had a route, how many
        of those the router itself would have sent elsewhere, and how many had none."""
        absent = sum(int(rows.sum()) for rows in self._absent.values())
        num = sum(len(rows) for rows in self._absent.values())
        flips = int(torch.stack(list(self._flips.values())).sum()) if self._flips else 0
        return num - absent, flips, absent


def _unfit(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"routed_experts: the routes of a reply {why}; --routing-replay needs an engine that "
        "serves the model that is trained",
        field="routed_experts",
    )
