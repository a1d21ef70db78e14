"""Labels of callers over the engine's growing versions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UpdateOrder
from rollout.http.updates.version_labels import VersionLabels

LARGEST = 2**53


@pytest.mark.parametrize(
    "label,current,version",
    [
        (None, 4, 5),
        ("9", 4, 9),
        ("4", 4, 5),
        ("3", 4, 5),
        ("step", 4, 5),
        ("-9", 4, 5),
        ("", 0, 1),
        ("007", 4, 7),
        ("1764150000000", 4, 1764150000000),
        (str(2**53), 4, 2**53),
        (str(2**53 + 1), 4, 5),
        ("9000000000000000000", 4, 5),
        (str(2**63), 4, 5),
        ("9" * 26, 4, 5),
        ("9" * 5000, 4, 5),
        ("٣٤", 4, 5),
        ("³", 0, 1),
        ("1_0", 0, 1),
        (" 9", 0, 1),
        ("9", 2**53 - 1, 2**53),
        (None, LARGEST - 1, LARGEST),
    ],
)
def test_a_label_reserves_a_version(label: str | None, current: int, version: int) -> None:
    assert VersionLabels().reserve(label, current) == version


def test_after_the_largest_version_there_is_none() -> None:
    with pytest.raises(UpdateOrder, match="no version is left"):
        VersionLabels().reserve("9", LARGEST)


@given(st.lists(st.one_of(st.none(), st.text(max_size=30), st.integers().map(str)), max_size=30))
def test_versions_grow_by_any_labels_and_never_run_out(names: list[str | None]) -> None:
    labels, version = VersionLabels(), 0
    for name in names:
        following = labels.reserve(name, version)
        assert version < following <= 2**53 + len(names)
        labels.name(following, name)
        assert labels.text(following) == (str(following) if name is None else name)
        version = following


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


def test_a_version_that_is_named_again_has_its_last_name() -> None:
    labels = VersionLabels()
    labels.name(5, "five")
    labels.name(5, None)
    assert labels.text(5) == "5"


def test_old_labels_are_forgotten() -> None:
    labels = VersionLabels()
    for version in range(5000):
        labels.name(version, f"v{version}")
    assert labels.text(0) == "0"
    assert labels.text(4999) == "v4999"
