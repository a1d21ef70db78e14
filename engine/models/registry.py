"""Architecture names and the modules that know them, imported when first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol, cast

from engine.errors import UnknownArchitecture
from engine.models.decoder_options import Options

ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        "LlamaForCausalLM": "engine.models.llama",
        "MistralForCausalLM": "engine.models.mistral",
        "Qwen2ForCausalLM": "engine.models.qwen2",
        "Qwen3ForCausalLM": "engine.models.qwen3",
    }
)


class Architecture(Protocol):
    """What a module of one architecture offers."""

    def options(self, source: Mapping[str, Any]) -> Options:
        """The decoder options of a config.json dict."""
        ...


def find(name: str) -> Architecture:
    """The architecture called `name` in config.json.

    Raises UnknownArchitecture with the names that are known.
    """
    module = ARCHITECTURES.get(name)
    if module is None:
        known = ", ".join(ARCHITECTURES)
        raise UnknownArchitecture(
            f"architecture {name!r} is not served; known: {known}", field="architectures"
        )
    return cast(Architecture, importlib.import_module(module))
