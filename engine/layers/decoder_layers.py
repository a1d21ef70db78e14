"""Decoder layers: attention and MLP, and where their norms are.

Every layer takes and gives the residual stream as two summands, the last output and what it is
still to be added to: the next norm closes the sum.

Legend: T tokens, E hidden size.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from engine.layers.attention import Attention, StepContext
from engine.layers.embedding import VocabEmbedding
from engine.layers.kinds import LayerKind
from engine.layers.norm import RMSNorm
from engine.layers.runtime import LayerRuntime
from engine.layers.summand import Summand, whole


class FeedForward(Protocol):
    """What a layer asks of its MLP, one dense or a mixture of experts."""

    fuses_few_rows: bool
    """Whether it has `add_to`."""

    def __call__(self, hidden_TE: torch.Tensor, context: StepContext) -> torch.Tensor:
        """[T, E] -> [T, E], the sum over ranks."""
        ...

    def summand(self, hidden_TE: torch.Tensor, context: StepContext) -> Summand:
        """The same, its sum over ranks left to the norm that follows."""
        ...

    def add_to(self, total_TE: torch.Tensor, norm: RMSNorm, context: StepContext) -> torch.Tensor:
        """`total + mlp(norm(total))` for the few rows of `LayerRuntime.few_rows`: [T, E]."""
        ...


Stream = tuple[Summand, torch.Tensor]
"""(last summand, the rest): both [T, E]; the residual stream is their sum."""


class DecoderLayer(Protocol):
    """What the decoder asks of a layer. Its submodules have Hugging Face's names."""

    fuses_few_rows: bool
    """Whether it has `add_to`."""

    def first(self, embedding: VocabEmbedding, ids_T: torch.Tensor, context: StepContext) -> Stream:
        """The layer as the first of a model: on the embedding of token ids, int [T]."""
        ...

    def __call__(
        self, hidden_TE: Summand, residual_TE: torch.Tensor, context: StepContext
    ) -> Stream:
        """The layer on the stream that the one before it gave."""
        ...

    def add_to(self, total_TE: torch.Tensor, context: StepContext) -> torch.Tensor:
        """The residual stream after the layer, for the few rows of `LayerRuntime.few_rows`."""
        ...


class _NormedInput(nn.Module):
    """A layer whose attention has a norm before it, which closes the sum of the stream."""

    def __init__(
        self, kind: LayerKind, attention: Attention, mlp: FeedForward, *, runtime: LayerRuntime
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(kind.hidden_size, kind.norm, runtime=runtime)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(kind.hidden_size, kind.norm, runtime=runtime)
        self.mlp = mlp

    def first(self, embedding: VocabEmbedding, ids_T: torch.Tensor, context: StepContext) -> Stream:
        """See `DecoderLayer`."""
        return self._after_norm(*embedding.normed(ids_T, self.input_layernorm), context)

    def forward(
        self, hidden_TE: Summand, residual_TE: torch.Tensor, context: StepContext
    ) -> Stream:
        """See `DecoderLayer`."""
        return self._after_norm(*self.input_layernorm.add(hidden_TE, residual_TE), context)

    def _after_norm(
        self, normed_TE: torch.Tensor, residual_TE: torch.Tensor, context: StepContext
    ) -> Stream:
        """The layer from the output of its first norm on."""
        raise NotImplementedError


class NormBeforeLayer(_NormedInput):
    """x + attention(norm(x)), then x + mlp(norm(x)): Llama and most others."""

    def __init__(
        self, kind: LayerKind, attention: Attention, mlp: FeedForward, *, runtime: LayerRuntime
    ) -> None:
        super().__init__(kind, attention, mlp, runtime=runtime)
        self.fuses_few_rows = mlp.fuses_few_rows and kind.norm.weighting == "rounded"

    def _after_norm(
        self, normed_TE: torch.Tensor, residual_TE: torch.Tensor, context: StepContext
    ) -> Stream:
        attended_TE = self.self_attn.summand(normed_TE, context)
        hidden_TE, residual_TE = self.post_attention_layernorm.add(attended_TE, residual_TE)
        return self.mlp.summand(hidden_TE, context), residual_TE

    def add_to(self, total_TE: torch.Tensor, context: StepContext) -> torch.Tensor:
        """See `DecoderLayer`."""
        total_TE = self.self_attn.add_to(total_TE, self.input_layernorm, context)
        return self.mlp.add_to(total_TE, self.post_attention_layernorm, context)


class NormAfterLayer(nn.Module):
    """x + norm(attention(x)), then x + norm(mlp(x)): OLMo 2 (arXiv:2501.00656)."""

    fuses_few_rows = False

    def __init__(
        self, kind: LayerKind, attention: Attention, mlp: FeedForward, *, runtime: LayerRuntime
    ) -> None:
        super().__init__()
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(kind.hidden_size, kind.norm, runtime=runtime)
        self.mlp = mlp
        self.post_feedforward_layernorm = RMSNorm(kind.hidden_size, kind.norm, runtime=runtime)

    def first(self, embedding: VocabEmbedding, ids_T: torch.Tensor, context: StepContext) -> Stream:
        """See `DecoderLayer`."""
        return self._on_total(embedding(ids_T), context)

    def forward(
        self, hidden_TE: Summand, residual_TE: torch.Tensor, context: StepContext
    ) -> Stream:
        """See `DecoderLayer`."""
        return self._on_total(whole(hidden_TE) + residual_TE, context)

    def _on_total(self, total_TE: torch.Tensor, context: StepContext) -> Stream:
        total_TE = total_TE + self.post_attention_layernorm(self.self_attn(total_TE, context))
        return self.post_feedforward_layernorm(self.mlp(total_TE, context)), total_TE

    def add_to(self, total_TE: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Not reached: the products of few rows are fused with a norm before them."""
        raise AssertionError


class NormBothLayer(_NormedInput):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))): Gemma 2 and 3."""

    fuses_few_rows = False

    def __init__(
        self, kind: LayerKind, attention: Attention, mlp: FeedForward, *, runtime: LayerRuntime
    ) -> None:
        super().__init__(kind, attention, mlp, runtime=runtime)
        size, norm = kind.hidden_size, kind.norm
        self.pre_feedforward_layernorm = RMSNorm(size, norm, runtime=runtime)
        self.post_feedforward_layernorm = RMSNorm(size, norm, runtime=runtime)

    def _after_norm(
        self, normed_TE: torch.Tensor, residual_TE: torch.Tensor, context: StepContext
    ) -> Stream:
        hidden_TE = self.post_attention_layernorm(self.self_attn(normed_TE, context))
        hidden_TE, residual_TE = self.pre_feedforward_layernorm.add(hidden_TE, residual_TE)
        return self.post_feedforward_layernorm(self.mlp(hidden_TE, context)), residual_TE

    def add_to(self, total_TE: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Not reached: the norms after the products come between them and the residual."""
        raise AssertionError
