"""The dense pre-norm decoder that Llama, Mistral, Qwen2 and Qwen3 share.

Module names are Hugging Face's, so a parameter's path is the name of its full tensor.

Legend: T tokens, S rows to sample, E hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from engine.layers.attention import Attention, AttentionShape, StepContext
from engine.layers.embedding import LMHead, VocabEmbedding
from engine.layers.mlp import GatedMLP
from engine.layers.norm import RMSNorm
from engine.layers.parameter import SINGLE, ShardedParameter
from engine.layers.rotary import Rotary
from engine.layers.runtime import LayerRuntime
from engine.models.config import ModelConfig

Target = tuple[ShardedParameter, str]
"""A parameter and the key of one of its parts."""


def _attention_shape(config: ModelConfig) -> AttentionShape:
    return AttentionShape(
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        qkv_bias=config.qkv_bias,
        o_bias=config.o_bias,
        norm_eps=config.rms_norm_eps if config.qk_norm else None,
    )


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm that also closes the residual before it."""

    def __init__(
        self, index: int, config: ModelConfig, rotary: Rotary, *, runtime: LayerRuntime
    ) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps, runtime=runtime)
        self.self_attn = Attention(index, _attention_shape(config), rotary, runtime=runtime)
        self.post_attention_layernorm = RMSNorm(size, eps, runtime=runtime)
        self.mlp = GatedMLP(size, config.intermediate_size, bias=config.mlp_bias, runtime=runtime)

    def forward(
        self, hidden_TE: torch.Tensor, residual_TE: torch.Tensor, context: StepContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output as (last summand, residual it is still to be added to)."""
        normed_TE, residual_TE = self.input_layernorm.add(hidden_TE, residual_TE)
        return self.after_norm(normed_TE, residual_TE, context)

    def after_norm(
        self, normed_TE: torch.Tensor, residual_TE: torch.Tensor, context: StepContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer from its first norm on; `forward` for the rest."""
        hidden_TE = self.self_attn(normed_TE, context)
        hidden_TE, residual_TE = self.post_attention_layernorm.add(hidden_TE, residual_TE)
        return self.mlp(hidden_TE), residual_TE

    def add_to(self, total_TE: torch.Tensor, context: StepContext) -> torch.Tensor:
        """The residual stream after the layer, for the few rows of `LayerRuntime.few_rows`."""
        total_TE = self.self_attn.add_to(total_TE, self.input_layernorm, context)
        return self.mlp.add_to(total_TE, self.post_attention_layernorm)


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig, max_position: int, *, runtime: LayerRuntime) -> None:
        super().__init__()
        rotary = Rotary(
            config.rope,
            config.head_dim,
            max_position,
            device=runtime.device,
            backend=runtime.backend,
        )
        self.few_rows = runtime.few_rows
        self.embed_tokens = VocabEmbedding(config.vocab_size, config.hidden_size, runtime=runtime)
        self.layers = nn.ModuleList(
            DecoderLayer(index, config, rotary, runtime=runtime)
            for index in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, runtime=runtime)

    def forward(self, ids_T: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Token ids int [T] -> hidden states after the final norm [T, E]."""
        first, *rest = (cast(DecoderLayer, layer) for layer in self.layers)
        if len(ids_T) <= self.few_rows:
            total_TE = self.embed_tokens(ids_T)
            for layer in (first, *rest):
                total_TE = layer.add_to(total_TE, context)
            return self.norm(total_TE)
        normed_TE, residual_TE = self.embed_tokens.normed(ids_T, first.input_layernorm)
        hidden_TE, residual_TE = first.after_norm(normed_TE, residual_TE, context)
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
        return {
            _full_name(path, key): (parameter, key)
            for path, parameter in self.named_parameters()
            if isinstance(parameter, ShardedParameter)
            for key in parameter.parts
        }

    def aliases(self) -> dict[str, str]:
        """Second names of tensors: that of a tied head."""
        if not self.config.tie_word_embeddings:
            return {}
        return {"lm_head.weight": "model.embed_tokens.weight"}

    def ignored_names(self) -> frozenset[str]:
        """Names old checkpoints hold that are computed here: rotary frequencies."""
        layers = range(self.config.num_layers)
        per_layer = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in layers}
        return frozenset(per_layer | {"model.rotary_emb.inv_freq"})


def _full_name(path: str, key: str) -> str:
    if key == SINGLE:
        return path
    owner, _, leaf = path.rpartition(".")
    parent, _, _ = owner.rpartition(".")
    return f"{parent}.{key}.{leaf}"
