"""Settings of rotary position embeddings, read from any of the forms files have them in.

Torch-free. Older files have `rope_theta` beside an optional `rope_scaling` dict; newer
ones a `rope_parameters` dict with everything inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import CheckpointError, UnknownArchitecture

DEFAULT_THETA = 10000.0
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary settings; which of them count depends on `rope_type`.

    factor: context extension (linear, llama3, yarn).
    original_max_position: context the frequencies were trained for (llama3, yarn).
    attention_factor: yarn's scale of cos and sin; None infers it from factor and mscale.
    frequency_divisors: one divisor per frequency, which GGUF files of llama3 type carry in
        place of the four numbers; applied on top of `rope_type`.
    """

    rope_type: str = "default"
    theta: float = DEFAULT_THETA
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    frequency_divisors: tuple[float, ...] | None = None


def read_rope(source: Mapping[str, Any]) -> RopeConfig:
    """Rotary settings of a config.json dict.

    Raises UnknownArchitecture for a rope type or a partial rotary factor that is not
    served, CheckpointError for a setting its type needs and does not have.
    """
    settings = {**(source.get("rope_scaling") or {}), **(source.get("rope_parameters") or {})}
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise UnknownArchitecture(
            f"rope_type {rope_type!r} is not served; known: {', '.join(ROPE_TYPES)}",
            field="rope_type",
        )
    _refuse_partial(source, settings)
    divisors = settings.get("frequency_divisors")
    return RopeConfig(
        rope_type=rope_type,
        theta=float(settings.get("rope_theta") or source.get("rope_theta") or DEFAULT_THETA),
        factor=_factor(rope_type, source, settings),
        original_max_position=_original(source, settings),
        low_freq_factor=_needed("low_freq_factor", "llama3", rope_type, settings, 1.0),
        high_freq_factor=_needed("high_freq_factor", "llama3", rope_type, settings, 4.0),
        beta_fast=float(settings.get("beta_fast") or 32.0),
        beta_slow=float(settings.get("beta_slow") or 1.0),
        attention_factor=settings.get("attention_factor"),
        mscale=settings.get("mscale"),
        mscale_all_dim=settings.get("mscale_all_dim"),
        truncate=bool(settings.get("truncate", True)),
        frequency_divisors=None if divisors is None else tuple(divisors),
    )


def _refuse_partial(source: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    partial = settings.get("partial_rotary_factor", source.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UnknownArchitecture(
            f"partial_rotary_factor {partial} is not served", field="partial_rotary_factor"
        )


def _original(source: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    own = source.get("original_max_position_embeddings")
    inner = settings.get("original_max_position_embeddings")
    return int(own or inner or source.get("max_position_embeddings") or 0)


def _factor(rope_type: str, source: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    if rope_type == "yarn" and "factor" in settings and settings["factor"] is None:
        return float(source["max_position_embeddings"]) / _original(source, settings)
    if rope_type == "default":
        return 1.0
    return _needed("factor", rope_type, rope_type, settings, 1.0)


def _needed(
    key: str, needed_by: str, rope_type: str, settings: Mapping[str, Any], default: float
) -> float:
    value = settings.get(key)
    if value is not None:
        return float(value)
    if rope_type == needed_by:
        raise CheckpointError(f"rope_type {rope_type!r} needs {key!r}", field=key)
    return default
