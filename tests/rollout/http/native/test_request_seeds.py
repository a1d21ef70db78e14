"""Seeds of requests that bring none: other ones on every server, the same with `--seed`."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.protocol import Request
from rollout.offline import run_file
from rollout.replica.inline import InlineReplica
from tests.helpers.fake_executor import FakeExecutor
from tests.helpers.http_app import run, serving
from tests.helpers.replicas import fake_config


async def _seeds(count: int, *, n: int = 2, **options: object) -> list[int]:
    engine = replace(fake_config(), seed=options.pop("seed", None))
    async with serving(engine=engine, **options) as server:
        for _ in range(count):
            body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 1, "n": n}}
            await server.post("/generate", body)
        return [request.seed for request in server.link.requests]


def test_servers_and_restarts_sample_differently() -> None:
    async def test() -> None:
        first, second = await _seeds(5), await _seeds(5)
        assert len({*first, *second}) == 20

    run(test)


def test_one_seed_repeats_every_request() -> None:
    async def test() -> None:
        first = await _seeds(5, seed=3)
        assert first == await _seeds(5, seed=3)
        assert not set(first) & set(await _seeds(5, seed=4))

    run(test)


def test_servers_that_share_a_seed_are_set_apart_by_their_ids() -> None:
    async def test() -> None:
        left = await _seeds(5, seed=3, replica_id="a")
        assert left == await _seeds(5, seed=3, replica_id="a")
        assert not set(left) & set(await _seeds(5, seed=3, replica_id="b"))

    run(test)


def test_the_seed_that_was_drawn_is_told() -> None:
    async def test() -> None:
        async with serving() as server:
            seed = (await server.get("/server_info")).json()["random_seed"]
            await server.post("/generate", {"input_ids": [5]})
            drawn = server.link.requests[0].seed
        assert isinstance(seed, int)
        assert drawn == (await _seeds(1, n=1, seed=seed))[0]

    run(test)


class Noting(InlineReplica):
    """Notes the seeds it is sent."""

    def __init__(self) -> None:
        config = fake_config()
        super().__init__(config, FakeExecutor(config))
        self.seeds: list[int] = []

    def submit(self, requests: list[Request]) -> None:
        self.seeds += [request.seed for request in requests]
        super().submit(requests)


@pytest.mark.parametrize("seed,equal", [(None, False), (5, True)])
def test_files_draw_theirs_too(tmp_path: Path, seed: int | None, equal: bool) -> None:
    line = json.dumps({"input_ids": [5], "sampling_params": {"max_new_tokens": 1}})
    (tmp_path / "in.jsonl").write_text(f"{line}\n{line}\n")
    runs = []
    for _ in range(2):
        with Noting() as replica:
            run_file(replica, None, tmp_path / "in.jsonl", tmp_path / "out.jsonl", seed=seed)
            runs.append(replica.seeds)
    assert len({*runs[0]}) == 2
    assert (runs[0] == runs[1]) is equal


def test_random_weights_keep_their_seed() -> None:
    assert EngineConfig(model="m").weight_seed == 0
    assert EngineConfig(model="m", seed=9).weight_seed == 9
