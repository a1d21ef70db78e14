"""Kills and stops of a real engine of two ranks, which share a model and wait for each other in
collectives or hold a copy each, and of the parts of a weight update."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import SlipstreamError
from engine.protocol import GenerateRequest, SamplingParams
from rollout.client import Client
from tests.helpers.doomed_ranks import push_and_kill
from tests.helpers.engines import drain, make_replica, request
from tests.helpers.loaded_server import Load, family, untyped
from tests.helpers.peers import until
from tests.helpers.rank_processes import run_ranks
from tests.helpers.serve_process import ServerProcess, gone
from tests.helpers.tiny_models import tiny_hf, write_tiny
from trainer_bridge.adapters.plain import PlainSource
from trainer_bridge.bridge import Publisher, PushOptions
from trainer_bridge.http_target import HttpTarget

pytestmark = pytest.mark.slow

COLLECTIVE_S = 5
EXIT_S = 60.0
SERVE = """
import logging, sys
from dataclasses import replace
from engine.config import CacheConfig, EngineConfig, ParallelConfig
from rollout.http.config import ServeConfig
from rollout.http import server
logging.basicConfig(level=logging.INFO)
server.find_tokenizer = lambda model: None
server.serve(ServeConfig(
    engine=EngineConfig(
        model=sys.argv[1], device="cpu", dtype="float32",
        cache=CacheConfig(memory_bytes=32 << 20),
        parallel=ParallelConfig(
            tp_size=int(sys.argv[2]), dp_size=int(sys.argv[4]), timeout_s={collective_s}
        ),
    ),
    port=0, restart=sys.argv[3],
))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny(folder, "qwen3", seed=0, eos_token_id=99, max_position_embeddings=4096)
    return folder


@contextmanager
def served(
    model: Path, *, tp: int = 2, dp: int = 1, restart: str = "never"
) -> Iterator[tuple[ServerProcess, dict[str, int]]]:
    code = SERVE.format(collective_s=COLLECTIVE_S)
    with ServerProcess(["-c", code, str(model), str(tp), restart, str(dp)]) as server:
        processes = family(server.process.pid)
        try:
            yield server, processes
        finally:
            for pid in processes.values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "how", [pytest.param(signal.SIGSTOP, marks=pytest.mark.long), signal.SIGKILL]
)
def test_a_rank_that_does_not_come_ends_the_engine_and_everybody_is_told(
    model: Path, how: signal.Signals
) -> None:
    with served(model) as (server, processes), Load(server.url, num=8, num_tokens=2000) as load:
        assert processes.keys() == {"server", "leader", "rank"}
        load.started()
        os.kill(processes["rank"], how)
        answers = load.answers()
        assert untyped(answers) == []
        assert all(a.error == "EngineDead" or a.finish == "abort" for a in answers), answers
        assert server.process.wait(EXIT_S) != 0
        assert any("rank 1" in line for line in server.lines)
        for name, pid in processes.items():
            assert gone(pid, EXIT_S), f"the {name} was left behind"


@pytest.mark.parametrize(
    "num",
    [pytest.param(1, id="no rows"), pytest.param(8, id="rows", marks=pytest.mark.long)],
)
def test_a_rank_of_another_copy_that_dies_ends_the_engine_and_everybody_is_told(
    model: Path, num: int
) -> None:
    """A single request is of the first copy: the step of the other one has no rows."""
    with (
        served(model, tp=1, dp=2) as (server, processes),
        Load(server.url, num=num, num_tokens=3000) as load,
    ):
        load.started()
        with server.client() as client:
            until(lambda: client.state().num_running == num, EXIT_S)
        os.kill(processes["rank"], signal.SIGKILL)
        answers = load.answers()
        assert untyped(answers) == []
        assert all(a.error == "EngineDead" or a.finish == "abort" for a in answers), answers
        assert server.process.wait(EXIT_S) != 0
        assert any("rank 1 (dp 1, tp 0)" in line for line in server.lines)
        for name, pid in processes.items():
            assert gone(pid, EXIT_S), f"the {name} was left behind"


class Killing(PlainSource):
    """Kills a process when its tenth tensor is asked for."""

    lasting = False

    def __init__(self, model: Any, pid: int) -> None:
        super().__init__(model)
        self._pid = pid

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for place, item in enumerate(super().tensors()):
            if place == 9:
                os.kill(self._pid, signal.SIGKILL)
                assert gone(self._pid)
            yield item


@pytest.mark.parametrize(
    ("who", "transport", "dp"),
    [
        pytest.param("leader", "nccl", 1, marks=pytest.mark.long),
        ("rank", "cuda_ipc", 1),
        pytest.param("rank", "nccl", 2, marks=pytest.mark.long),
    ],
)
def test_an_engine_that_dies_in_an_update_fails_it_and_another_takes_the_next(
    model: Path, tmp_path: Path, who: str, transport: Any, dp: int
) -> None:
    new = tiny_hf("qwen3", 5, eos_token_id=99, max_position_embeddings=4096)
    options = PushOptions(transport=transport, bucket_bytes=4096, timeout_s=20.0)
    serving = served(model, tp=2 // dp, dp=dp, restart="on-failure")
    with serving as (server, processes), server.client() as client:
        killing = Killing(new, processes[who])
        with pytest.raises(SlipstreamError):
            Publisher(killing, [HttpTarget(server.url)], options).push(1)
        server.wait_for_another(client)
        assert client.state().open_update is None
        with Publisher(PlainSource(new), [HttpTarget(server.url)], options) as publisher:
            publisher.push(2)
        assert client.state().version == 2
        new.save_pretrained(tmp_path / "new")
        assert greedy(client) == expected(tmp_path / "new")
        old = family(server.process.pid) | processes
        assert server.terminate() == 0
        for pid in {*old.values(), *processes.values()}:
            assert gone(pid, EXIT_S)


def greedy(client: Client) -> list[int]:
    sampling = SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True)
    (reply,) = client.generate(GenerateRequest(input_ids=[3, 14, 15], sampling_params=sampling))
    return reply.output_ids


def expected(folder: Path) -> list[int]:
    with make_replica(folder) as replica:
        asked = request("r", [3, 14, 15], max_new_tokens=12, temperature=0.0, ignore_eos=True)
        replica.submit([asked])
        return drain(replica)["r"].token_ids.tolist()


@pytest.mark.parametrize(("tp", "dp"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.long)])
def test_a_rank_that_dies_while_it_receives_excerpts_is_told_to_every_trainer_rank(
    model: Path, tmp_path: Path, tp: int, dp: int
) -> None:
    with served(model, tp=tp, dp=dp) as (server, processes):
        act = partial(push_and_kill, url=server.url, pid=processes["rank"])
        told = run_ranks(act, 2, tmp_path / "trainers")
    for answers, seconds in told:
        assert answers[0] == "1"
        assert "Error" in answers[1] or "EngineDead" in answers[1]
        # Far from the update's own 300 s.
        assert seconds < 100
    assert any("EngineDead" in answers[1] for answers, _ in told), told
