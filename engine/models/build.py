"""From a configuration to a module."""

from __future__ import annotations

from engine.layers.runtime import LayerRuntime
from engine.models.config import ModelConfig
from engine.models.decoder import CausalLM


def build_model(
    config: ModelConfig, *, runtime: LayerRuntime, max_position: int | None = None
) -> CausalLM:
    """The model of `config` on `runtime.device`, its weights uninitialised.

    max_position: positions the rotary table covers; None takes the model's own.
    Raises ModelError when the ranks of `runtime.mesh` do not divide the model.
    """
    return CausalLM(config, runtime=runtime, max_position=max_position).eval()
