"""Version labels of callers, and the growing integers that the engine counts with."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import UpdateOrder
from engine.protocol.types import MAX_VERSION

_MAX_LABELS = 4096
_LARGEST_LABEL = MAX_VERSION
"""A label beyond this names a version and is none."""


class VersionLabels:
    """What each version of the weights is called on the wire; its number if nothing else.

    changed: called after every change, before the version that was named can serve.
    """

    def __init__(self) -> None:
        self._labels: OrderedDict[int, str] = OrderedDict()
        self.changed: Callable[[], None] = lambda: None

    @property
    def labels(self) -> Mapping[int, str]:
        """By version; those that are called by their number are not among them."""
        return self._labels

    def reserve(self, label: str | None, current: int) -> int:
        """The version that an update called `label` gets: a decimal label greater than
        `current`, 2**53 at most, is used as it is; anything else counts on by one.

        Raises UpdateOrder when no greater version is left.
        """
        number = _number(label)
        if number is not None and number > current:
            return number
        if current >= MAX_VERSION:
            raise UpdateOrder(f"no version is left after {current}", field="version")
        return current + 1

    def name(self, version: int, label: str | None) -> None:
        """Call `version` by `label` from now on, or by its number."""
        self._labels.pop(version, None)
        if label is not None and label != str(version):
            self._labels[version] = label
            while len(self._labels) > _MAX_LABELS:
                self._labels.popitem(last=False)
        self.changed()

    def text(self, version: int) -> str:
        """The label of `version`."""
        return self.labels.get(version, str(version))

    def relabel(self, meta_info: dict[str, Any]) -> None:
        """Write labels in place of numbers into the `meta_info` of a reply."""
        if not self.labels:
            return
        if meta_info.get("weight_version") is not None:
            meta_info["weight_version"] = self.text(int(meta_info["weight_version"]))
        for key in ("weight_versions", "kv_versions"):
            for span in meta_info.get(key, []):
                span["version"] = self.text(int(span["version"]))


def _number(label: str | None) -> int | None:
    """The integer that a label of ASCII digits is, if it may be a version."""
    if label is None or len(label) > len(str(_LARGEST_LABEL)):
        return None
    if not (label.isascii() and label.isdecimal()):
        return None
    number = int(label)
    return number if number <= _LARGEST_LABEL else None
