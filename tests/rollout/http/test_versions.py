"""Labels of callers over the engine's growing versions."""

import pytest

from rollout.http.versions import VersionLabels


@pytest.mark.parametrize(
    "label,current,version",
    [(None, 4, 5), ("9", 4, 9), ("4", 4, 5), ("3", 4, 5), ("step", 4, 5), ("-9", 4, 5), ("", 0, 1)],
)
def test_a_label_reserves_a_version(label: str | None, current: int, version: int) -> None:
    assert VersionLabels().reserve(label, current) == version


def test_replies_are_relabelled() -> None:
    labels = VersionLabels()
    labels.name(5, "five")
    labels.name(6, "6")
    meta = {
        "weight_version": "5",
        "weight_versions": [{"version": "4", "start": 0, "end": 1}, {"version": "5", "start": 1}],
        "kv_versions": [{"version": "5", "start": 0, "end": 9}],
    }
    labels.relabel(meta)
    assert meta["weight_version"] == "five"
    assert [span["version"] for span in meta["weight_versions"]] == ["4", "five"]  # type: ignore[index]
    assert meta["kv_versions"][0]["version"] == "five"  # type: ignore[index]
    labels.relabel({"weight_version": None})
    assert labels.text(6) == "6"


def test_old_labels_are_forgotten() -> None:
    labels = VersionLabels()
    for version in range(5000):
        labels.name(version, f"v{version}")
    assert labels.text(0) == "0"
    assert labels.text(4999) == "v4999"
