"""From a configuration to a module."""

from __future__ import annotations

from engine.layers.runtime import LayerRuntime
from engine.models.classifier import SequenceClassifier
from engine.models.config import ModelConfig
from engine.models.decoder import CausalLM

Model = CausalLM | SequenceClassifier
"""What an engine serves: the two take and give the same, logits or scores apart."""


def build_model(
    config: ModelConfig, *, runtime: LayerRuntime, max_position: int | None = None
) -> Model:
    """The model of `config` on `runtime.device`, its weights uninitialised.

    max_position: positions the rotary table covers; None takes the model's own.
    Raises ModelError when the ranks of `runtime.mesh` do not divide the model.
    """
    kind = SequenceClassifier if config.num_labels else CausalLM
    return kind(config, runtime=runtime, max_position=max_position).eval()
