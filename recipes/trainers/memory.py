"""Less memory for activations, for some more time."""

from __future__ import annotations

from transformers import PreTrainedModel


def recompute_layers(model: PreTrainedModel) -> None:
    """Have the backward pass recompute each layer's activations instead of keeping them.

    transformers does so in training mode only. The layers alone are put into it, not what is
    in them, so that dropout stays off.
    """
    # The older name is deprecated where the newer one exists.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
