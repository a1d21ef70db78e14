"""Ranks of several workers in one group of a trainer's."""

import json
from typing import Any

import pytest

from engine.errors import InvalidRequest
from rollout.router.group_ranks import bodies
from rollout.router.workers.facts import Facts
from rollout.router.workers.worker import Worker


def workers(*sizes: int) -> list[Worker]:
    found = []
    for number, size in enumerate(sizes):
        worker = Worker(f"http://w{number}:1", str(number), connect_s=1.0)
        worker.facts = Facts(num_gpus=size)
        found.append(worker)
    return found


def sent(path: str, body: dict[str, Any], *sizes: int) -> list[dict[str, Any]]:
    return [json.loads(one) for one in bodies(path, json.dumps(body).encode(), workers(*sizes))]


def test_each_worker_begins_behind_the_ranks_of_those_before_it() -> None:
    body = {"master_address": "h", "master_port": 1, "rank_offset": 1, "world_size": 8}
    found = sent("/init_weights_update_group", body, 2, 4, 1)
    assert [one["rank_offset"] for one in found] == [1, 3, 7]
    assert all({**one, "rank_offset": 1} == body for one in found)
    assert sum(worker.facts.num_ranks for worker in workers(2, 4, 1)) == 7


def test_so_it_is_in_the_other_dialects() -> None:
    info = {"init_info": {"rank_offset": 2, "world_size": 4, "master_port": 1}, "x": 1}
    found = sent("/init_weight_transfer_engine", info, 1, 1)
    assert [one["init_info"]["rank_offset"] for one in found] == [2, 3]
    assert found[0]["x"] == 1
    command = {"type": "join_group", "rank_offset": 1, "world_size": 3, "name": "g"}
    assert [one["rank_offset"] for one in sent("/command", command, 1, 1)] == [1, 2]


@pytest.mark.parametrize("size", [2, 4])
def test_a_group_of_another_size_is_refused_before_anybody_joins(size: int) -> None:
    body = {"rank_offset": 1, "world_size": size}
    with pytest.raises(InvalidRequest, match=f"world_size is {size}.*are 3"):
        sent("/init_weights_update_group", body, 1, 1)


def test_other_calls_are_the_same_for_all() -> None:
    body = b'{ "type":"get_state" }'
    assert bodies("/command", body, workers(1, 2)) == [body, body]
    assert bodies("/pause", b"", workers(1, 2)) == [b"", b""]
