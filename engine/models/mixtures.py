"""Keys of config.json that say which layers have experts, and how many. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import CheckpointError
from engine.models.config_keys import flag, needed, whole_number


def count(source: Mapping[str, Any], key: str) -> int:
    """A whole number, 0 or more. Raises CheckpointError naming the key for anything else."""
    value = needed(source, key)
    return 0 if value == 0 and not isinstance(value, bool | float) else whole_number(source, key)


def chosen(source: Mapping[str, Any], num_experts: int, count_key: str) -> int:
    """`num_experts_per_tok`. Raises CheckpointError where there are not so many experts."""
    top_k = whole_number(source, "num_experts_per_tok")
    if top_k > num_experts:
        raise CheckpointError(
            f"'num_experts_per_tok' is {top_k}, and '{count_key}' {num_experts}",
            field="num_experts_per_tok",
        )
    return top_k


def switched(source: Mapping[str, Any], key: str) -> bool:
    """true or false. Raises CheckpointError naming the key for anything else."""
    found = flag(source, key)
    if found is None:
        needed(source, key)
    return bool(found)


def spaced(source: Mapping[str, Any], num_layers: int) -> list[bool]:
    """Which layers have experts: every `decoder_sparse_step`-th, but for `mlp_only_layers`.

    Raises CheckpointError naming the key for what is no such number or list.
    """
    step = whole_number(source, "decoder_sparse_step")
    dense = source.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(index) is not int for index in dense):
        raise CheckpointError(
            f"'mlp_only_layers' is {dense!r}, not a list of layers", field="mlp_only_layers"
        )
    return [index not in dense and (index + 1) % step == 0 for index in range(num_layers)]


def one_of(source: Mapping[str, Any], keys: tuple[str, ...], default: int) -> tuple[str, int]:
    """The key, of several that mean the same, that a file has, and its value as of `count`; the
    first one with `default` if it has none.

    Raises CheckpointError where two differ.
    """
    found = [key for key in keys if key in source]
    values = {key: count(source, key) for key in found}
    if len(set(values.values())) > 1:
        told = ", ".join(f"'{key}' is {value}" for key, value in values.items())
        raise CheckpointError(f"{told}: the two are one setting", field=found[0])
    return (found[0], values[found[0]]) if found else (keys[0], default)
