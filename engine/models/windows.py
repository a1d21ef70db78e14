"""Which layers of a config.json have a sliding window. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import CheckpointError, UnknownArchitecture
from engine.models.config_keys import flag, whole_number

SLIDING = "sliding_attention"
_FULL = "full_attention"


def layer_types(source: Mapping[str, Any], num_layers: int) -> list[str] | None:
    """`layer_types`, one a layer; None where there are none.

    Raises UnknownArchitecture for a type that is neither full nor sliding attention,
    CheckpointError for anything but a list of them that is long enough.
    """
    found = source.get("layer_types")
    if found is None:
        return None
    if not isinstance(found, list):
        raise CheckpointError(f"'layer_types' is {found!r}, not a list", field="layer_types")
    for kind in found:
        if kind not in (_FULL, SLIDING):
            raise UnknownArchitecture(
                f"layer_types: {kind!r} is not served; known: {_FULL}, {SLIDING}",
                field="layer_types",
            )
    if len(found) < num_layers:
        raise CheckpointError(
            f"'layer_types' has {len(found)} entries for {num_layers} layers", field="layer_types"
        )
    return found[:num_layers]


def listed_windows(source: Mapping[str, Any], sliding: Sequence[bool]) -> list[int | None]:
    """`sliding_window` for each layer that `layer_types` or a pattern says slides.

    Raises CheckpointError where one slides and there is no window.
    """
    if any(sliding) and source.get("sliding_window") is None:
        raise CheckpointError(
            "some layers have sliding attention, but there is no 'sliding_window'",
            field="sliding_window",
        )
    return windows_of(source, sliding)


def switched_types(source: Mapping[str, Any], types: Sequence[str]) -> list[int | None]:
    """Windows of layers of these types, in families where `use_sliding_window` must be on too.

    Raises CheckpointError where it is not and a layer slides.
    """
    if SLIDING in types and not flag(source, "use_sliding_window"):
        raise CheckpointError(
            f"'layer_types' has {SLIDING}, but 'use_sliding_window' is not on", field="layer_types"
        )
    return listed_windows(source, [kind == SLIDING for kind in types])


def windows_of(source: Mapping[str, Any], sliding: Sequence[bool]) -> list[int | None]:
    """`sliding_window`, if there is one, for each layer that slides."""
    if source.get("sliding_window") is None or not any(sliding):
        return [None] * len(sliding)
    length = whole_number(source, "sliding_window")
    return [length if slides else None for slides in sliding]


def switched_windows(source: Mapping[str, Any], num_layers: int) -> list[int | None]:
    """Windows of the families that have them where `use_sliding_window` is on: in the layers
    that `layer_types` says, or in those from `max_window_layers` on. Raises as `layer_types` and
    `windows_of`, and CheckpointError for a `max_window_layers` that is no integer."""
    types = layer_types(source, num_layers)
    if types is not None:
        return switched_types(source, types)
    if not flag(source, "use_sliding_window"):
        return [None] * num_layers
    return windows_of(source, _late_layers(source, num_layers))


def _late_layers(source: Mapping[str, Any], num_layers: int) -> list[bool]:
    first = source.get("max_window_layers")
    if first is not None and (isinstance(first, bool) or not isinstance(first, int)):
        raise CheckpointError(
            f"'max_window_layers' is {first!r}, not an integer", field="max_window_layers"
        )
    return [index >= (first or 0) for index in range(num_layers)]


def refuse_windows(source: Mapping[str, Any], num_layers: int, positions: int) -> None:
    """For families that have none: raise UnknownArchitecture for a window that would count."""
    types = layer_types(source, num_layers)
    if not flag(source, "use_sliding_window"):
        return
    late = _late_layers(source, num_layers)
    windows = windows_of(source, late if types is None else [kind == SLIDING for kind in types])
    if any(window is not None and window < positions for window in windows):
        raise UnknownArchitecture(
            f"sliding_window {source['sliding_window']} is not served with this architecture: "
            "only full attention is",
            field="sliding_window",
        )
