"""Architecture names and the pages that know them, imported when first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol, cast

from engine.errors import UnknownArchitecture
from engine.layers.kinds import LayerKind
from engine.models.decoder_options import Options
from engine.models.sizes import Sizes

ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        "LlamaForCausalLM": "engine.models.llama",
        "MistralForCausalLM": "engine.models.mistral",
        "Qwen2ForCausalLM": "engine.models.qwen2",
        "Qwen3ForCausalLM": "engine.models.qwen3",
        "Qwen2MoeForCausalLM": "engine.models.qwen2_moe",
        "Qwen3MoeForCausalLM": "engine.models.qwen3_moe",
        "MixtralForCausalLM": "engine.models.mixtral",
        "Glm4MoeForCausalLM": "engine.models.glm4_moe",
        "Olmo2ForCausalLM": "engine.models.olmo2",
        "SmolLM3ForCausalLM": "engine.models.smollm3",
        "Gemma3ForCausalLM": "engine.models.gemma3",
    }
)
CLASSIFIERS: Mapping[str, str] = MappingProxyType(
    {
        name.replace("ForCausalLM", "ForSequenceClassification"): page
        for name, page in ARCHITECTURES.items()
        if name not in ("Gemma3ForCausalLM", "Glm4MoeForCausalLM")
    }
    | {"Gemma3TextForSequenceClassification": "engine.models.gemma3"}
)
"""The same decoders with a head that scores a sequence (`engine.models.classifier`)."""

_NOT_BUILT: Mapping[str, str] = MappingProxyType(
    {
        "DeepseekV2ForCausalLM": "its attention (multi-head latent attention, MLA)",
        "DeepseekV3ForCausalLM": "its attention (multi-head latent attention, MLA)",
        "GptOssForCausalLM": "its attention with sinks, and its experts with biases",
        "OlmoeForCausalLM": "its norms of queries and keys beside `clip_qkv`",
    }
)
"""Architectures that are asked for, and what of them is missing."""


class Architecture(Protocol):
    """The page of a family: a module that offers these."""

    OPTIONS: Options
    """How its config.json is read."""

    def layers(self, source: Mapping[str, Any], sizes: Sizes) -> tuple[LayerKind, ...]:
        """The layers of a config.json dict, `Options.defaults` filled in, from first to last.

        Raises UnknownArchitecture and CheckpointError, naming the key.
        """
        ...


def find(name: str) -> Architecture:
    """The architecture called `name` in config.json.

    Raises UnknownArchitecture with the names that are known.
    """
    module = ARCHITECTURES.get(name) or CLASSIFIERS.get(name)
    if name in _NOT_BUILT:
        raise UnknownArchitecture(
            f"architecture {name!r} is not served: {_NOT_BUILT[name]} is not built",
            field="architectures",
        )
    if module is None:
        known = ", ".join((*ARCHITECTURES, *CLASSIFIERS))
        raise UnknownArchitecture(
            f"architecture {name!r} is not served; known: {known}", field="architectures"
        )
    return cast(Architecture, importlib.import_module(module))
