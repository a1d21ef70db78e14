"""Version labels of callers, and the growing integers that the engine counts with."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

_MAX_LABELS = 4096


class VersionLabels:
    """What each version of the weights is called on the wire; its number if nothing else."""

    def __init__(self) -> None:
        self._labels: OrderedDict[int, str] = OrderedDict()

    def reserve(self, label: str | None, current: int) -> int:
        """The version that an update called `label` gets: a decimal label greater than
        `current` is used as it is, anything else counts on by one."""
        if label is not None and label.isdecimal() and int(label) > current:
            return int(label)
        return current + 1

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
