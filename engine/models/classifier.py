"""A decoder that scores a sequence: Hugging Face's *ForSequenceClassification, reward models.

Legend: T tokens, S rows to score, E hidden size, L labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from engine.layers.attention import StepContext
from engine.layers.parameter import ShardedParameter, whole
from engine.layers.runtime import LayerRuntime
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.full_names import (
    FusedTensor,
    Target,
    full_tensors,
    fused_tensors,
    second_names,
)
from engine.models.passed_over import PassedOver


class ScoreHead(nn.Module):
    """Hidden states to scores, `score.weight` [L, E] on every rank.

    The product is computed in float32 whatever the model's dtype: a reward in 16 bits has steps of
    its size / 256, which is as large as the differences that rewards are compared by.
    """

    def __init__(self, hidden_size: int, num_labels: int, *, runtime: LayerRuntime) -> None:
        super().__init__()
        shape = (num_labels, hidden_size)
        storage = torch.empty(*shape, dtype=runtime.dtype, device=runtime.device)
        self.weight = ShardedParameter(storage, whole(shape))

    def forward(self, hidden_SE: torch.Tensor) -> torch.Tensor:
        """[S, E] -> float32 [S, L]."""
        return F.linear(hidden_SE.float(), self.weight.float())


class SequenceClassifier(nn.Module):
    """A decoder and the head that scores a sequence by the hidden state of its last token.

    Weights are uninitialised until a loader places them. There is no language-model head, so
    `tie_word_embeddings` of the configuration says nothing.
    """

    def __init__(
        self, config: ModelConfig, *, runtime: LayerRuntime, max_position: int | None = None
    ) -> None:
        """max_position: positions the rotary table covers; None takes the model's own."""
        super().__init__()
        self.config = config
        self.model = Decoder(config, max_position or config.max_position, runtime=runtime)
        self.score = ScoreHead(config.hidden_size, config.num_labels, runtime=runtime)

    def forward(self, ids_T: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Token ids int [T] -> hidden states after the final norm [T, E]."""
        return self.model(ids_T, context)

    def compute_logits(self, hidden_SE: torch.Tensor, *, widen: bool = True) -> torch.Tensor:
        """Hidden states [S, E] -> raw scores float32 [S, L], whatever `widen` says."""
        return self.score(hidden_SE)

    def weight_index(self) -> dict[str, Target]:
        """Every full tensor by its Hugging Face name, and where it goes."""
        return full_tensors(self)

    def fused(self) -> dict[str, FusedTensor]:
        """As `CausalLM.fused`."""
        return fused_tensors(self)

    def aliases(self) -> dict[str, str]:
        """Second names of tensors: those of transformers in memory."""
        return second_names(self)

    def ignored_names(self) -> PassedOver:
        """As `CausalLM.ignored_names`."""
        return PassedOver(self.config)
