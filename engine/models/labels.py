"""The labels that a sequence classifier scores, as its config.json says them. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import CheckpointError
from engine.models.config_keys import whole_number

DEFAULT_LABELS = 2
"""transformers leaves `id2label` out of the file where there are two."""


def num_labels(source: Mapping[str, Any]) -> int:
    """Labels of a config.json dict: entries of `id2label`, else `num_labels`, else 2.

    Raises CheckpointError, naming the key, for what is no count and for two that differ.
    """
    names = source.get("id2label")
    count = None if source.get("num_labels") is None else whole_number(source, "num_labels")
    if names is None:
        return DEFAULT_LABELS if count is None else count
    if not isinstance(names, Mapping) or not names:
        raise CheckpointError(
            f"'id2label' is {names!r}, not an object with a name for each label", field="id2label"
        )
    if count not in (None, len(names)):
        raise CheckpointError(
            f"'num_labels' is {count}, but 'id2label' names {len(names)}", field="num_labels"
        )
    return len(names)


def label_names(source: Mapping[str, Any], count: int) -> list[str]:
    """What the `count` labels of a config.json dict are called: by `id2label`, whose keys JSON
    writes as text; transformers' LABEL_0 and so on where it has no name for one."""
    names = source.get("id2label") or {}
    known = {str(key): str(name) for key, name in names.items()} if count else {}
    return [known.get(str(number), f"LABEL_{number}") for number in range(count)]
