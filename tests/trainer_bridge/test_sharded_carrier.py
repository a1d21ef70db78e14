"""Every trainer rank sends its own pieces; a refusal reaches all of them and costs nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.rank_processes import run_ranks
from tests.helpers.sharded_publish import publish_despite_faults, publish_some

pytestmark = pytest.mark.slow


WAYS = ("excerpts", "broadcasts")


@pytest.fixture(
    scope="module", params=[(way, copies) for way in WAYS for copies in (1, 2)], ids=str
)
def told(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("sharded")
    way, copies = request.param
    found = run_ranks(partial(publish_some, way=way, copies=copies), 2, folder)
    assert found[0]["ranks"] == copies
    return found


def test_updates_that_are_allowed_reach_the_engine_from_both_ranks(told) -> None:
    for rank in told:
        assert (rank["first"], rank["second"], rank["third"]) == (1, 2, 3)
    assert told[0]["tokens"] == 2 * [told[0]["wanted"]]


@pytest.mark.parametrize("name", ["backwards", "again backwards"])
def test_a_refused_begin_is_told_to_every_rank_before_and_after_the_groups_form(
    told, name: str
) -> None:
    assert told[0][name].startswith("UpdateOrder")
    assert told[1][name].startswith("GroupError: trainer rank 0 failed: UpdateOrder")


@pytest.fixture(scope="module", params=WAYS)
def faults(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("faults")
    return run_ranks(partial(publish_despite_faults, way=request.param), 2, folder)


@pytest.mark.parametrize(
    ("step", "answers", "served"),
    [
        ("first", ("1", "1"), [1, 1]),
        ("rank 0 fails", ("RuntimeError: the gather", "GroupError"), [1, 1]),
        ("rank 1 fails", ("GroupError", "RuntimeError: the gather"), [1, 1]),
        ("no receive", ("EngineDead: engine 1: it is gone", "GroupError"), [1, 1]),
        ("no join", ("EngineDead: engine 0: it is gone", "GroupError"), [1, 1]),
        ("no prepare", ("EngineDead: engine 1: it is gone", "GroupError"), [1, 1]),
        ("no commit", ("FleetDivided: version 2 serves on engine 0", "GroupError"), [2, 1]),
        ("again", ("2", "2"), [2, 2]),
        ("restarted", ("3", "3"), [3, 3]),
    ],
)
def test_what_fails_on_one_rank_is_told_to_all_and_the_next_update_works(
    faults, step: str, answers: tuple[str, str], served: list[int]
) -> None:
    for told, answer in zip(faults, answers, strict=True):
        assert told[step][0].startswith(answer)
        assert told[step][1] < 45, "a rank waited for its deadline of 60 s"
    assert faults[0][step][2] == served


def test_both_engines_serve_the_same_in_the_end(faults) -> None:
    first, second = faults[0]["same"]
    assert first == second
