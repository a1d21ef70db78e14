"""Mixtures of experts whose choice is not their own, and what experts their tokens go to."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from engine.protocol import RouteArray
from recipes.trainers.route_shelf import RouteShelf
from recipes.trainers.routers import routers_of
from recipes.types import Trajectory

SIGMOID = ("DeepseekV3TopkRouter", "Glm4MoeTopkRouter")


def perturbed(model: Any, scale: float = 0.05, seed: int = 3) -> Any:
    """A copy that chooses experts by other router weights, and weighs them as the model does: what
    an engine is to its trainer, with differences that are far larger."""
    engine = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for router in routers_of(engine):
        noise_EH = scale * torch.randn(router.module.weight.shape, generator=generator)
        router.module.register_forward_hook(functools.partial(_choose_otherwise, noise_EH))
    return engine


def _choose_otherwise(noise_EH: torch.Tensor, router: Any, args: Any, output: Any) -> Any:
    logits_TE, weights_TK, _ = output
    hidden_TH = args[0].reshape(-1, args[0].shape[-1])
    ids_TK = (logits_TE + hidden_TH @ noise_EH.T).topk(router.top_k, dim=-1).indices
    return logits_TE, masked_weights(router, logits_TE, ids_TK).to(weights_TK.dtype), ids_TK


def masked_weights(router: Any, logits_TE: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """The weights of given experts, from dense scores in which all others are 0."""
    by_sigmoid = type(router).__name__ in SIGMOID
    scores_TE = logits_TE.float().sigmoid() if by_sigmoid else logits_TE.float().softmax(-1)
    dense_TE = scores_TE * torch.zeros_like(scores_TE).scatter(1, ids_TK, 1.0)
    always = type(router).__name__ == "MixtralTopKRouter"
    if always or getattr(router, "norm_topk_prob", False):
        dense_TE = dense_TE / dense_TE.sum(-1, keepdim=True)
    return dense_TE.gather(1, ids_TK) * getattr(router, "routed_scaling_factor", 1.0)


@torch.no_grad()
def routes_of(model: Any, trajectories: Sequence[Trajectory]) -> list[RouteArray]:
    """uint8 [prompt + response - 1, layers, K] of each sequence, computed alone; 255 in dense
    layers."""
    seen: dict[int, torch.Tensor] = {}
    handles = [
        router.module.register_forward_hook(functools.partial(_note, seen, router.layer))
        for router in routers_of(model)
    ]
    found = []
    for t in trajectories:
        ids = np.concatenate([t.prompt_ids, t.response_ids])[:-1].astype(np.int64)
        model(torch.from_numpy(ids)[None])
        shape = (len(ids), model.config.num_hidden_layers, model.config.num_experts_per_tok)
        routes = np.full(shape, 255, np.uint8)
        for layer, chosen_TK in seen.items():
            routes[:, layer] = chosen_TK.numpy()
        found.append(routes)
    for handle in handles:
        handle.remove()
    return found


def _note(seen: dict[int, torch.Tensor], layer: int, module: Any, args: Any, output: Any) -> None:
    seen[layer] = output[2]


def with_routes(
    trajectories: Sequence[Trajectory], routes: Sequence[RouteArray], shelf: RouteShelf
) -> tuple[Trajectory, ...]:
    """The trajectories, their routes on a shelf."""
    pairs = zip(trajectories, routes, strict=True)
    return tuple(dataclasses.replace(t, routes=shelf.put(array)) for t, array in pairs)
