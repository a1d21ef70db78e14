"""What transformers' routers choose for a text, to compare an engine's routes with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from engine.protocol import RequestOutput, RouteArray

GAP = 1e-4
"""Scores of experts that are nearer to each other may change places with the rounding of sums."""


@torch.no_grad()
def exact_routes(model: Any, tokens: Sequence[int]) -> tuple[RouteArray, np.ndarray]:
    """Routes of all but the last of `tokens`, uint8 [T - 1, layers, K], zeros in layers without
    experts; and which of them are sure, bool [T - 1, layers]."""
    top_k = model.config.num_experts_per_tok
    ids = torch.tensor([list(tokens[:-1])])
    found = model(ids, output_router_logits=True).router_logits
    layers = [
        index
        for index, layer in enumerate(model.model.layers)
        if hasattr(layer.mlp, "experts") or hasattr(layer, "block_sparse_moe")
    ]
    assert len(layers) == len(found), "router logits of other layers"
    shape = (len(tokens) - 1, model.config.num_hidden_layers, top_k)
    routes, sure = np.zeros(shape, np.uint8), np.ones(shape[:2], np.bool_)
    for layer, logits_TN in zip(layers, found, strict=True):
        best = logits_TN.float().softmax(-1).topk(top_k + 1)
        routes[:, layer] = best.indices[:, :top_k].numpy()
        sure[:, layer] = (best.values.diff(dim=-1).abs() > GAP).all(-1).numpy()
    return routes, sure


def check_exact(model: Any, prompt: Sequence[int], output: RequestOutput) -> None:
    """The routes of a final output are those that transformers computes for its tokens."""
    wanted, sure = exact_routes(model, [*prompt, *output.token_ids.tolist()])
    start, found = output.routed_experts_start, output.routed_experts
    assert found is not None and found.shape == wanted[start:].shape, output.rid
    wanted, sure = wanted[start:], sure[start:]
    assert sure.mean() > 0.9, "hardly a choice of these is sure"
    wrong = (found != wanted).any(-1) & sure
    assert not wrong.any(), f"{output.rid}: {np.argwhere(wrong)[:5].tolist()} of {wrong.shape}"
