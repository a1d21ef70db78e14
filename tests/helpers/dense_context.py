"""Run a model on one sequence without the engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.layers.attention import ProjectedHeads
from engine.layers.kinds import LayerKind
from engine.layers.route_sink import RouteSink
from engine.models.decoder import CausalLM


class DenseContext:
    """Causal attention over one whole sequence, in plain torch, keeping no KV."""

    def __init__(
        self, layers: Sequence[LayerKind], num_tokens: int, device: torch.device | str = "cpu"
    ) -> None:
        self.layers = layers
        self.positions_T = torch.arange(num_tokens, device=device)
        self.num_rows: torch.Tensor | None = None
        self.routes: RouteSink | None = None

    def attend(self, layer_index: int, heads: ProjectedHeads) -> torch.Tensor:
        """Softmax attention, [T, H, D]; query head h reads KV head h // (H / K)."""
        q_THD, k_TKD, v_TKD = heads.rotated()
        repeats = q_THD.shape[1] // k_TKD.shape[1]
        k_THD, v_THD = (x.repeat_interleave(repeats, dim=1) for x in (k_TKD, v_TKD))
        scores_HTT = torch.einsum("thd,shd->hts", q_THD, k_THD)
        kind = self.layers[layer_index].attention
        distance_TT = self.positions_T[:, None] - self.positions_T[None, :]
        hidden_TT = distance_TT < 0
        if kind.window is not None:
            hidden_TT |= distance_TT >= kind.window
        scores_HTT = (scores_HTT * kind.scale).masked_fill(hidden_TT, float("-inf"))
        weights_HTT = scores_HTT.softmax(-1)
        return torch.einsum("hts,shd->thd", weights_HTT, v_THD)


@torch.inference_mode()
def dense_logits(model: CausalLM, ids_T: torch.Tensor) -> torch.Tensor:
    """float32 logits [T, V] of every position of one sequence."""
    context = DenseContext(model.config.layers, len(ids_T), ids_T.device)
    return model.compute_logits(model(ids_T, context))
