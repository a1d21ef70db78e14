"""Keys of a GGUF file below its architecture's prefix, and what becomes of each.

Every key is in one of four places: `READ` is computed by `engine/models/gguf_config.py`,
`GGUFFamily.reads` by that of one architecture, `HARMLESS` changes nothing in the families that are
served, and `NEUTRAL` is refused unless its value changes nothing. A key that is in none is refused
unless it is zero, false or empty.
What the keys mean: ggml-org/ggml docs/gguf.md and llama.cpp's src/llama-model.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from engine.errors import CheckpointError, UnknownArchitecture

READ: Mapping[str, str] = MappingProxyType(
    {
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "feed_forward_length": "intermediate_size",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "context_length": "max_position_embeddings",
        "rope.freq_base": "rope_theta",
        "rope.scaling.type": "rope_type",
        "rope.scaling.factor": "factor",
        "rope.scaling.original_context_length": "original_max_position_embeddings",
        "rope.scaling.attn_factor": "attention_factor",
        "rope.scaling.yarn_beta_fast": "beta_fast",
        "rope.scaling.yarn_beta_slow": "beta_slow",
        "rope.scale_linear": "factor",
    }
)
"""Keys that are computed, and the key of config.json that says the same."""
HARMLESS = frozenset(
    {
        # The embedding's rows count, whatever this says.
        "vocab_size",
        # Of layer norms with a mean, which no served family has.
        "attention.layer_norm_epsilon",
        # How the converter found the rows; in the file they lie as llama.cpp wants them.
        "tensor_data_layout",
        "rope.scaling.finetuned",
        # Of layers with a sliding window, which are refused by that key or read it.
        "rope.freq_base_swa",
    }
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the neutral value of some keys follows from."""

    head_dim: int
    hidden_size: int
    context_length: int
    scaling: str


_Neutral = Callable[[Sizes], Iterable[Any]]


def _off(sizes: Sizes) -> Iterable[Any]:
    return (0, False)


def _one(sizes: Sizes) -> Iterable[Any]:
    return (0, 1)


def _head_dim(sizes: Sizes) -> Iterable[Any]:
    return (sizes.head_dim,)


NEUTRAL: Mapping[str, _Neutral] = MappingProxyType(
    {
        "attention.causal": lambda sizes: (True,),
        "attention.clamp_kqv": _off,
        "attention.max_alibi_bias": _off,
        "attention.output_scale": _one,
        "attention.scale": lambda sizes: (0, sizes.head_dim**-0.5),
        "attention.temperature_length": _off,
        "attention.temperature_scale": _off,
        "attention.value_length": _head_dim,
        "attention.key_length_swa": _head_dim,
        "attention.value_length_swa": _head_dim,
        "attn_logit_softcapping": _off,
        "embedding_length_out": lambda sizes: (0, sizes.hidden_size),
        "embedding_scale": _one,
        "expert_count": _off,
        "expert_used_count": _off,
        "expert_weights_scale": _one,
        "final_logit_softcapping": _off,
        "logit_scale": _one,
        "nextn_predict_layers": _off,
        "pooling_type": _off,
        "residual_scale": _one,
        "rope.dimension_count": _head_dim,
        "rope.dimension_count_swa": _head_dim,
        "rope.scaling.alpha": _one,
        "rope.scaling.yarn_attn_factor": _one,
        "rope.scaling.yarn_ext_factor": lambda sizes: (-1, 1 if sizes.scaling == "yarn" else 0),
        "rope.scaling.yarn_log_multiplier": _off,
        "use_parallel_residual": _off,
    }
)
"""Keys that are refused, but for the values with which they change nothing."""


def check_gguf_keys(
    metadata: Mapping[str, Any], architecture: str, sizes: Sizes, reads: Collection[str] = ()
) -> None:
    """Refuse a file with a key that would have to be computed and is not.

    reads: keys that this architecture computes beside `READ`.

    Raises UnknownArchitecture naming the key; CheckpointError for a file that is no whole model.
    """
    _check_kind(metadata)
    for name, value in metadata.items():
        key = name.removeprefix(f"{architecture}.")
        if key == name or key in READ or key in reads or key in HARMLESS:
            continue
        if key == "attention.sliding_window":
            neutral = value == 0 or _number(value) >= sizes.context_length
        elif key in NEUTRAL:
            neutral = any(_equal(value, own) for own in NEUTRAL[key](sizes))
        else:
            neutral = not (any(value) if isinstance(value, list) else value)
        if not neutral:
            raise UnknownArchitecture(
                f"the GGUF file has {name} {_shown(value)}, which is not served", field=name
            )


def _check_kind(metadata: Mapping[str, Any]) -> None:
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(
            f"the GGUF file's general.type is {kind!r}, not a model", field="general.type"
        )
    if metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"the GGUF file is one of {metadata['split.count']}; join them with llama-gguf-split",
            field="split.count",
        )


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) else math.nan


def _equal(value: Any, neutral: Any) -> bool:
    if isinstance(value, bool) or isinstance(neutral, bool):
        return bool(value is neutral)
    # A file's numbers have 24 bits.
    return isinstance(value, int | float) and math.isclose(value, neutral, rel_tol=1e-6)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
