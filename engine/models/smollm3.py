"""SmolLM3: Llama with layers that know no positions, every fourth as a rule.

Those may have a sliding window besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from engine.errors import CheckpointError
from engine.layers.kinds import LayerKind
from engine.models.config_keys import flag, whole_number
from engine.models.decoder_options import Options
from engine.models.sizes import Sizes
from engine.models.windows import layer_types, switched_types, windows_of

OPTIONS = Options(
    reads=frozenset({"no_rope_layers", "no_rope_layer_interval"}),
    defaults={
        "num_key_value_heads": 4,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
    },
    has_windows=True,
)
_INTERVAL = 4


def layers(source: Mapping[str, Any], sizes: Sizes) -> tuple[LayerKind, ...]:
    """`attention_bias` sets all four attention biases, `mlp_bias` those of the MLP.

    `no_rope_layers` has 1 for a layer that rotates and 0 for one that does not.
    """
    bias = bool(flag(source, "attention_bias"))
    layer = sizes.layer(qkv_bias=bias, o_bias=bias, mlp_bias=bool(flag(source, "mlp_bias")))
    unrotated = replace(layer, attention=replace(layer.attention, rope=None))
    rotates = _rotates(source, sizes.num_layers)
    kinds = [layer if turns else unrotated for turns in rotates]
    return sizes.windowed(kinds, _windows(source, rotates))


def _rotates(source: Mapping[str, Any], num_layers: int) -> list[bool]:
    listed = source.get("no_rope_layers")
    if listed is None:
        interval = _INTERVAL
        if source.get("no_rope_layer_interval") is not None:
            interval = whole_number(source, "no_rope_layer_interval")
        return [(index + 1) % interval != 0 for index in range(num_layers)]
    is_list = isinstance(listed, list) and all(type(turns) is int for turns in listed)
    if not is_list or len(listed) < num_layers or not set(listed) <= {0, 1}:
        raise CheckpointError(
            f"'no_rope_layers' is {listed!r}, not a list of 0 and 1 for {num_layers} layers",
            field="no_rope_layers",
        )
    return [turns == 1 for turns in listed[:num_layers]]


def _windows(source: Mapping[str, Any], rotates: list[bool]) -> list[int | None]:
    types = layer_types(source, len(rotates))
    if types is not None:
        return switched_types(source, types)
    switched = bool(flag(source, "use_sliding_window"))
    return windows_of(source, [switched and not turns for turns in rotates])
