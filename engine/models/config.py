"""What a model is made of, read from a config.json dict. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import CheckpointError, InvalidRequest, UnknownArchitecture
from engine.layers.kinds import LayerKind, MoeKind, NormKind
from engine.layers.rope_config import RopeConfig, served_positions
from engine.models.config_keys import (
    check_biases,
    check_keys,
    filled,
    flag,
    needed,
    number,
    token_ids,
    whole_number,
)
from engine.models.decoder_options import Options
from engine.models.labels import num_labels
from engine.models.registry import CLASSIFIERS, find
from engine.models.sizes import Sizes
from engine.models.windows import refuse_windows
from engine.protocol import ExpertFacts


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder. Sizes count elements; `max_position` counts tokens that are served.

    layers: the kind of each layer. norm: of the stream after the last one. rope: rotary settings
    that say how far the model reaches. embedding_scale: what its rows are multiplied by.
    eos_token_ids: tokens that end a generation; generation_config.json's where it has any.
    torch_dtype: dtype of the files ("bfloat16"); None where they do not say.
    overflows_float16: see `engine.models.decoder_options.Options`.
    num_labels: scores of a sequence that a classifier gives; 0 for a model that generates.
    extra_layers: see `engine.models.decoder_options.Options`.
    """

    architecture: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    layers: tuple[LayerKind, ...]
    norm: NormKind
    rope: RopeConfig
    embedding_scale: float
    max_position: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    torch_dtype: str | None
    overflows_float16: bool = False
    num_labels: int = 0
    extra_layers: frozenset[int] = frozenset()

    def require_dtype(self, dtype: str) -> None:
        """Raise InvalidRequest where activations of such models overflow in `dtype`."""
        if dtype == "float16" and self.overflows_float16:
            raise InvalidRequest(
                f"{self.architecture} is not served in float16: its activations exceed 65504, the "
                "largest number that float16 has; use bfloat16 or float32",
                field="dtype",
            )

    @property
    def num_layers(self) -> int:
        """Layers, each with KV of its own."""
        return len(self.layers)

    @property
    def experts(self) -> MoeKind | None:
        """The kind of the layers that have experts, one for all of them; None where none has."""
        kinds = (layer.mlp for layer in self.layers)
        return next((kind for kind in kinds if isinstance(kind, MoeKind)), None)

    @property
    def expert_facts(self) -> ExpertFacts | None:
        """The experts as a leader is told of them."""
        kind = self.experts
        if kind is None:
            return None
        return ExpertFacts(
            num_layers=self.num_layers,
            layers=[i for i, layer in enumerate(self.layers) if isinstance(layer.mlp, MoeKind)],
            num_experts=kind.routing.num_experts,
            top_k=kind.routing.top_k,
        )

    @property
    def attention_scale(self) -> float:
        """What attention scores are multiplied by, the same in all layers."""
        return self.layers[0].attention.scale


def read_config(
    source: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The model that a config.json dict describes.

    generation: dict of generation_config.json, if there is one; its token ids win.
    Raises UnknownArchitecture for an architecture, activation, window or rope type that is
    not served; CheckpointError, naming the key, for a missing or malformed entry.
    """
    architecture = _architecture(source)
    family = find(architecture)
    options = family.OPTIONS
    source = filled(source, options)
    sizes = _sizes(source, options)
    layers = family.layers(source, sizes)
    check_biases(source, layers[0])
    return ModelConfig(
        architecture=architecture,
        hidden_size=sizes.hidden_size,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        intermediate_size=sizes.intermediate_size,
        vocab_size=whole_number(source, "vocab_size"),
        layers=layers,
        norm=layers[0].norm,
        rope=sizes.rope,
        embedding_scale=sizes.hidden_size**0.5 if options.scales_embedding else 1.0,
        max_position=sizes.positions,
        tie_word_embeddings=bool(flag(source, "tie_word_embeddings")),
        eos_token_ids=_eos_ids(source, generation or {}),
        bos_token_id=_bos_id(source, generation or {}),
        torch_dtype=_dtype(source),
        overflows_float16=options.overflows_float16,
        num_labels=num_labels(source) if architecture in CLASSIFIERS else 0,
        extra_layers=options.extra_layers,
    )


def _sizes(source: Mapping[str, Any], options: Options) -> Sizes:
    rope = options.rope(source)
    positions = served_positions(rope, whole_number(source, "max_position_embeddings"))
    _refuse_unserved(source, options)
    num_heads = whole_number(source, "num_attention_heads")
    hidden_size = whole_number(source, "hidden_size")
    num_layers = whole_number(source, "num_hidden_layers")
    if not options.has_windows:
        refuse_windows(source, num_layers, positions)
    head_dim = _head_dim(source, options, hidden_size, num_heads)
    return Sizes(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_kv_heads(source, num_heads),
        head_dim=head_dim,
        intermediate_size=whole_number(source, "intermediate_size"),
        rms_norm_eps=_epsilon(source),
        positions=positions,
        rope=_fitted(rope, head_dim),
    )


def _epsilon(source: Mapping[str, Any]) -> float:
    needed(source, "rms_norm_eps")
    return number(source, "rms_norm_eps")


def _fitted(rope: RopeConfig, head_dim: int) -> RopeConfig:
    """`rope` if it suits heads of `head_dim`."""
    turned = rope.num_turned(head_dim)
    if turned % 2 or not turned:
        raise UnknownArchitecture(
            f"{turned} of a head_dim of {head_dim} turn, and rotary embeddings turn pairs",
            field="head_dim",
        )
    divisors = rope.frequency_divisors
    if divisors is not None and len(divisors) != turned // 2:
        raise CheckpointError(
            f"{len(divisors)} rotary divisors do not fit a head_dim of {head_dim}",
            field="frequency_divisors",
        )
    return rope


def _architecture(source: Mapping[str, Any]) -> str:
    names = needed(source, "architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(
            f"'architectures' is {names!r}, not a list with a class name", field="architectures"
        )
    return names[0]


def _kv_heads(source: Mapping[str, Any], num_heads: int) -> int:
    if source.get("num_key_value_heads") is None:
        return num_heads
    num_kv_heads = whole_number(source, "num_key_value_heads")
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"num_key_value_heads {num_kv_heads} does not divide num_attention_heads {num_heads}",
            field="num_key_value_heads",
        )
    return num_kv_heads


def _head_dim(source: Mapping[str, Any], options: Options, hidden_size: int, num_heads: int) -> int:
    if source.get("head_dim") is not None:
        return whole_number(source, "head_dim")
    if options.default_head_dim is not None:
        return options.default_head_dim
    if hidden_size % num_heads:
        raise CheckpointError(
            f"num_attention_heads {num_heads} does not divide hidden_size {hidden_size}, "
            "and there is no 'head_dim'",
            field="head_dim",
        )
    return hidden_size // num_heads


def _refuse_unserved(source: Mapping[str, Any], options: Options) -> None:
    key = options.activation_key
    activation = source.get(key) or options.activations[0]
    if activation not in options.activations:
        raise UnknownArchitecture(
            f"{key} {activation!r} is not served; known: {options.activations[0]}", field=key
        )
    quantised = source.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise UnknownArchitecture(
            f"quantization_config: checkpoints quantised by {method!r} are not served",
            field="quantization_config",
        )
    check_keys(source, options)


def _eos_ids(source: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    ids = token_ids(generation, "eos_token_id")
    return (token_ids(source, "eos_token_id") if ids is None else ids) or ()


def _bos_id(source: Mapping[str, Any], generation: Mapping[str, Any]) -> int | None:
    for place in (generation, source):
        ids = token_ids(place, "bos_token_id")
        if ids is not None and len(ids) != 1:
            raise CheckpointError(f"'bos_token_id' is {ids}, not one id", field="bos_token_id")
        if ids is not None:
            return ids[0]
    return None


def _dtype(source: Mapping[str, Any]) -> str | None:
    for key in ("dtype", "torch_dtype"):
        value = source.get(key)
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"{key!r} is {value!r}, not the name of a dtype", field=key)
        if value:
            return value
    return None
