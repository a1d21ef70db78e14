"""Version labels of callers, and the growing integers that the engine counts with."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from engine.protocol.types import INT64_MAX

_MAX_LABELS = 4096
_MAX_DIGITS = len(str(INT64_MAX))


class VersionLabels:
    """What each version of the weights is called on the wire; its number if nothing else."""

    def __init__(self) -> None:
        self._labels: OrderedDict[int, str] = OrderedDict()

    def reserve(self, label: str | None, current: int) -> int:
        """The version that an update called `label` gets: a decimal label greater than
        `current` is used as it is, anything else counts on by one."""
        number = 0
        if label is not None and label.isdecimal() and len(label) <= _MAX_DIGITS:
            number = int(label)
        return number if current < number <= INT64_MAX else current + 1

    def name(self, version: int, label: str | None) -> None:
        """Call `version` by `label` from now on."""
        if label is None or label == str(version):
            return
        self._labels[version] = label
        while len(self._labels) > _MAX_LABELS:
            self._labels.popitem(last=False)

    def text(self, version: int) -> str:
        """The label of `version`."""
        return self._labels.get(version, str(version))

    def relabel(self, meta_info: dict[str, Any]) -> None:
        """Write labels in place of numbers into the `meta_info` of a reply."""
        if not self._labels:
            return
        if meta_info.get("weight_version") is not None:
            meta_info["weight_version"] = self.text(int(meta_info["weight_version"]))
        for key in ("weight_versions", "kv_versions"):
            for span in meta_info.get(key, []):
                span["version"] = self.text(int(span["version"]))
