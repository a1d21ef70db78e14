"""A decoder of layers of any kind, and its head.

Module names are Hugging Face's, so a parameter's path is the name of its full tensor.

Legend: T tokens, S rows to sample, E hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from engine.layers.attention import StepContext
from engine.layers.decoder_layers import DecoderLayer
from engine.layers.embedding import LMHead, VocabEmbedding
from engine.layers.layer_blocks import build_layer
from engine.layers.norm import RMSNorm
from engine.layers.rotary import RotaryTables
from engine.layers.runtime import LayerRuntime
from engine.models.config import ModelConfig
from engine.models.full_names import (
    FusedTensor,
    Target,
    full_tensors,
    fused_tensors,
    second_names,
)
from engine.models.passed_over import PassedOver


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig, max_position: int, *, runtime: LayerRuntime) -> None:
        super().__init__()
        rotaries = RotaryTables(max_position, runtime)
        self.embed_tokens = VocabEmbedding(
            config.vocab_size, config.hidden_size, scale=config.embedding_scale, runtime=runtime
        )
        self.layers = nn.ModuleList(
            build_layer(index, kind, rotaries, runtime=runtime)
            for index, kind in enumerate(config.layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm, runtime=runtime)
        fuses = all(layer.fuses_few_rows for layer in self._layers())
        self.few_rows = runtime.few_rows if fuses else 0

    def _layers(self) -> list[DecoderLayer]:
        return cast(list[DecoderLayer], [*self.layers])

    def forward(self, ids_T: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Token ids int [T] -> hidden states after the final norm [T, E]."""
        first, *rest = self._layers()
        if len(ids_T) <= self.few_rows:
            total_TE = self.embed_tokens(ids_T)
            for layer in (first, *rest):
                total_TE = layer.add_to(total_TE, context)
            return self.norm(total_TE)
        hidden_TE, residual_TE = first.first(self.embed_tokens, ids_T, context)
        for layer in rest:
            hidden_TE, residual_TE = layer(hidden_TE, residual_TE, context)
        return self.norm.add(hidden_TE, residual_TE)[0]


class CausalLM(nn.Module):
    """A decoder and its head. Weights are uninitialised until a loader places them."""

    def __init__(
        self, config: ModelConfig, *, runtime: LayerRuntime, max_position: int | None = None
    ) -> None:
        """max_position: positions the rotary table covers; None takes the model's own."""
        super().__init__()
        self.config = config
        self.model = Decoder(config, max_position or config.max_position, runtime=runtime)
        self.lm_head = LMHead(
            config.vocab_size,
            config.hidden_size,
            runtime=runtime,
            tied_to=self.model.embed_tokens if config.tie_word_embeddings else None,
        )

    def forward(self, ids_T: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Token ids int [T] -> hidden states after the final norm [T, E]."""
        return self.model(ids_T, context)

    def compute_logits(self, hidden_SE: torch.Tensor, *, widen: bool = True) -> torch.Tensor:
        """Hidden states [S, E] -> logits [S, V], float32 unless `widen` is off."""
        return self.lm_head(hidden_SE, widen=widen)

    def weight_index(self) -> dict[str, Target]:
        """Every full tensor by its Hugging Face name, and where it goes; a tied head is not
        among them (see `aliases`)."""
        return full_tensors(self)

    def fused(self) -> dict[str, FusedTensor]:
        """Tensors that may come in place of several, by name."""
        return fused_tensors(self)

    def aliases(self) -> dict[str, str]:
        """Second names of tensors: that of a tied head, and those of transformers in memory."""
        tied = {"lm_head.weight": "model.embed_tokens.weight"}
        return second_names(self) | (tied if self.config.tie_word_embeddings else {})

    def ignored_names(self) -> PassedOver:
        """Names that checkpoints hold and that are not needed."""
        return PassedOver(self.config)
