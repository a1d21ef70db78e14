"""Every trainer rank sends its own pieces; a refusal reaches all of them and costs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.rank_processes import run_ranks
from tests.helpers.sharded_publish import publish_some


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("sharded")
    return run_ranks(publish_some, 2, folder)


def test_updates_that_are_allowed_reach_the_engine_from_both_ranks(told) -> None:
    for rank in told:
        assert (rank["first"], rank["second"], rank["third"]) == (1, 2, 3)
    assert told[0]["tokens"] == told[0]["wanted"]


@pytest.mark.parametrize("name", ["backwards", "again backwards"])
def test_a_refused_begin_is_told_to_every_rank_before_and_after_the_groups_form(
    told, name: str
) -> None:
    assert told[0][name].startswith("UpdateOrder")
    assert told[1][name].startswith("GroupError: trainer rank 0 failed: UpdateOrder")
