"""Settings of rotary position embeddings, read from any of the forms files have them in.

Torch-free. Older files have `rope_theta` beside an optional `rope_scaling` dict; newer
ones a `rope_parameters` dict with everything inside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from engine.errors import CheckpointError, UnknownArchitecture

DEFAULT_THETA = 10000.0
_YARN = ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_USED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "default": (),
        "linear": ("factor",),
        "dynamic": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": (*_YARN, "truncate"),
    }
)
"""The settings that each type computes with. A setting that its type does not use is refused."""
ROPE_TYPES = tuple(_USED)
# Part of any type, or without effect on the rotation.
_COMMON = (
    "rope_theta",
    "rope_type",
    "type",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "finetuned",
    "frequency_divisors",
)
_LARGEST_POSITION = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary settings; which of them count depends on `rope_type`.

    factor: context extension (linear, llama3, yarn). Type dynamic is the default one up to
        max_position_embeddings, and no longer context is served.
    original_max_position: context the frequencies were trained for (llama3, yarn).
    attention_factor: yarn's scale of cos and sin; None infers it from factor and mscale.
    partial: share of a head's dims that turn, the first ones; the rest stay as they are.
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
    partial: float = 1.0
    frequency_divisors: tuple[float, ...] | None = None

    def num_turned(self, head_dim: int) -> int:
        """Dims of a head that turn."""
        return int(head_dim * self.partial)


def read_rope(source: Mapping[str, Any], *, may_be_partial: bool = False) -> RopeConfig:
    """Rotary settings of a config.json dict, as transformers 5 computes them.

    may_be_partial: whether the family has `partial_rotary_factor`; elsewhere it is refused.
    Raises UnknownArchitecture for a rope type or a setting that is not served, CheckpointError
    for a setting its type needs and does not have, or that is no number it can compute with.
    Both name the key.
    """
    settings = _settings(source)
    rope_type = _rope_type(settings)
    _refuse_unused(rope_type, settings)
    partial = _partial(source, settings, may_be_partial)
    theta = _positive("rope_theta", settings.get("rope_theta", source.get("rope_theta")))
    rope = RopeConfig(
        rope_type=rope_type,
        theta=DEFAULT_THETA if theta is None else theta,
        factor=_factor(rope_type, source, settings),
        original_max_position=_original(source, settings),
        low_freq_factor=_needed("low_freq_factor", "llama3", rope_type, settings, 1.0),
        high_freq_factor=_needed("high_freq_factor", "llama3", rope_type, settings, 4.0),
        beta_fast=_positive("beta_fast", settings.get("beta_fast") or None) or 32.0,
        beta_slow=_positive("beta_slow", settings.get("beta_slow") or None) or 1.0,
        attention_factor=_positive("attention_factor", settings.get("attention_factor")),
        mscale=_positive("mscale", settings.get("mscale") or None),
        mscale_all_dim=_positive("mscale_all_dim", settings.get("mscale_all_dim") or None),
        truncate=_truncate(settings),
        partial=partial,
        frequency_divisors=_divisors(settings.get("frequency_divisors")),
    )
    _refuse_contradictions(rope)
    return rope


def served_positions(rope: RopeConfig, max_position: int) -> int:
    """Tokens of context that a model with these settings serves.

    max_position: `max_position_embeddings`. Model cards switch YaRN on by `rope_scaling` alone
    and leave that at the length of pretraining, so what YaRN extends to counts where it is more.
    Raises CheckpointError naming `factor` for a length beyond 2**31 - 1.
    """
    if rope.rope_type != "yarn":
        return max_position
    extended = rope.factor * rope.original_max_position
    if extended > _LARGEST_POSITION:
        raise CheckpointError(
            f"rope factor {rope.factor:g} extends {rope.original_max_position} positions to "
            f"{extended:g}; the most is {_LARGEST_POSITION}",
            field="factor",
        )
    return max(max_position, int(extended))


def _settings(source: Mapping[str, Any]) -> dict[str, Any]:
    """What the two spellings say together. transformers would take `rope_scaling` alone and lose
    the rest, so they may not differ."""
    older, newer = (_object(source, key) for key in ("rope_scaling", "rope_parameters"))
    if older and newer:
        for key in sorted({*older, *newer} - {"type", "rope_type", "rope_theta"}):
            _agree(key, older.get(key), newer.get(key))
        _agree("rope_type", _rope_type(older), _rope_type(newer))
    return {**newer, **older}


def _object(source: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = source.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise CheckpointError(f"{key!r} is {value!r}, not an object of settings", field=key)
    return dict(value or {})


def _agree(key: str, older: Any, newer: Any) -> None:
    if older != newer:
        raise CheckpointError(
            f"rope_scaling and rope_parameters differ: {key!r} is {older!r} and {newer!r}; put "
            "all settings into rope_parameters",
            field=key,
        )


def _rope_type(settings: Mapping[str, Any]) -> str:
    named = [settings[key] for key in ("rope_type", "type") if settings.get(key) is not None]
    if not named:
        scaled = [
            k for k, v in settings.items() if k not in ("rope_theta", "partial_rotary_factor") and v
        ]
        if set(scaled) - {"frequency_divisors"}:
            raise CheckpointError(
                f"the rope settings have {scaled[0]!r} but no 'rope_type' ('type' in older "
                f"files); known: {', '.join(ROPE_TYPES)}",
                field="rope_type",
            )
        return "default"
    for name in named:
        if name not in ROPE_TYPES:
            raise UnknownArchitecture(
                f"rope_type {name!r} is not served; known: {', '.join(ROPE_TYPES)}",
                field="rope_type",
            )
    if len(set(named)) > 1:
        raise CheckpointError(
            f"'rope_type' is {named[0]!r} but 'type' is {named[1]!r}", field="rope_type"
        )
    return str(named[0])


def _refuse_unused(rope_type: str, settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if key in _COMMON or key in _USED[rope_type] or _is_neutral(value):
            continue
        raise UnknownArchitecture(
            f"rope setting {key!r} is {value!r}, which is not served with rope_type {rope_type!r}",
            field=key,
        )


def _is_neutral(value: Any) -> bool:
    """Whether a factor or a switch of this value changes nothing."""
    return value is None or value is False or (value == 1 and value is not True)


def _partial(source: Mapping[str, Any], settings: Mapping[str, Any], may_be_partial: bool) -> float:
    key = "partial_rotary_factor"
    value = settings.get(key, source.get(key))
    if value in (None, 1, 1.0):
        return 1.0
    share = _positive(key, value)
    if not may_be_partial:
        raise UnknownArchitecture(f"{key} {value!r} is not served", field=key)
    if share is None or share > 1:
        raise CheckpointError(f"{key!r} is {value!r}, not a share of a head", field=key)
    return share


def _original(source: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    key = "original_max_position_embeddings"
    for value in (source.get(key), settings.get(key)):
        number = _positive(key, value)
        if number is not None:
            if number != int(number) or number > _LARGEST_POSITION:
                raise CheckpointError(f"{key!r} is {value!r}, not a number of tokens", field=key)
            return int(number)
    return int(_positive("max_position_embeddings", source.get("max_position_embeddings")) or 0)


def _factor(rope_type: str, source: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    if rope_type == "yarn" and "factor" in settings and settings["factor"] is None:
        total = _positive("max_position_embeddings", source.get("max_position_embeddings"))
        return (total or 1.0) / (_original(source, settings) or 1)
    if rope_type == "default":
        return 1.0
    return _needed("factor", rope_type, rope_type, settings, 1.0)


def _needed(
    key: str, needed_by: str, rope_type: str, settings: Mapping[str, Any], default: float
) -> float:
    value = _positive(key, settings.get(key))
    if value is None and rope_type == needed_by:
        raise CheckpointError(f"rope_type {rope_type!r} needs {key!r}", field=key)
    return default if value is None else value


def _positive(key: str, value: Any) -> float | None:
    """A setting as a number; None where there is none."""
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise CheckpointError(f"{key!r} is {value!r}, not a positive finite number", field=key)
    return number


def _truncate(settings: Mapping[str, Any]) -> bool:
    value = settings.get("truncate", True)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"'truncate' is {value!r}, not true or false", field="truncate")
    return bool(value)


def _divisors(value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    key = "frequency_divisors"
    if not isinstance(value, list | tuple):
        raise CheckpointError(f"{key!r} is {value!r}, not a list of numbers", field=key)
    return tuple(_positive(key, number) or 1.0 for number in value)


def _refuse_contradictions(rope: RopeConfig) -> None:
    if rope.rope_type == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise CheckpointError(
            f"'high_freq_factor' {rope.high_freq_factor:g} is not above 'low_freq_factor' "
            f"{rope.low_freq_factor:g}",
            field="high_freq_factor",
        )
    if rope.rope_type == "yarn" and rope.theta <= 1:
        raise CheckpointError(
            f"'rope_theta' {rope.theta:g} is not above 1, which YaRN needs", field="rope_theta"
        )
    if rope.rope_type in ("llama3", "yarn") and not rope.original_max_position:
        raise CheckpointError(
            f"rope_type {rope.rope_type!r} needs 'original_max_position_embeddings'",
            field="original_max_position_embeddings",
        )
