"""One of three trainer ranks killed at every stage of a sharded push, and the trainer that
follows: the engine serves the old version or the new one, and the survivors are told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import rank_processes
from tests.helpers.doomed_ranks import FIRST_SEED, SECOND_SEED, TIMEOUT_S, push_and_die, trained
from tests.helpers.tiny_models import tiny_hf, write_tiny
from tests.trainer_bridge.test_killed_trainers import Engines
from tests.trainer_bridge.test_push import logprob_gap
from trainer_bridge.bridge import Publisher, PushOptions

pytestmark = pytest.mark.slow

SIZE = 3
CASES = [
    ("form", 1, "shadow"),
    ("plan", 2, "undo"),
    ("carry", 0, "shadow"),
    ("carry", 1, "shadow"),
    ("carry", 2, "undo"),
    ("carry", 1, "in_place"),
    ("commit", 0, "shadow"),
    ("commit", 2, "shadow"),
]
NAMES = [f"{stage}-{victim}-{mode}" for stage, victim, mode in CASES]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Engines]]:
    folder = tmp_path_factory.mktemp("tiny")
    old = write_tiny(folder, "qwen2", tie_word_embeddings=True)
    server = Engines(folder, len(CASES))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield old, server
    server.shutdown()
    server.server_close()
    for engine in server.engines:
        engine.close()


def survivors(folder: Path, victim: int, **how: Any) -> list[tuple[list[str], float]]:
    """What the ranks that were not killed say."""
    folder.mkdir()
    act = partial(push_and_die, victim=victim, **how)
    calls = [(act, rank, SIZE, folder) for rank in range(SIZE)]
    with rank_processes.forked(rank_processes._enter, calls) as processes:
        for process in processes:
            process.join(120)
        codes = [process.exitcode for process in processes]
    assert codes == [-9 if rank == victim else 0 for rank in range(SIZE)]
    alive = [rank for rank in range(SIZE) if rank != victim]
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in alive]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_killed_rank_costs_its_update_and_nothing_else(engines, tmp_path, case) -> None:
    old, server = engines
    place, (stage, victim, mode) = CASES.index(case), case
    engine, lock = server.engines[place], server.locks[place]
    url = f"http://127.0.0.1:{server.server_address[1]}/{place}"
    told = survivors(tmp_path / "ranks", victim, stage=stage, mode=mode, url=url)
    late = stage in ("carry", "commit")
    for answers, seconds in told:
        assert answers[:-1] == (["1"] if late else [])
        assert "Error" in answers[-1]
        assert seconds < 4 * TIMEOUT_S
    deadline = time.monotonic() + 60
    while True:
        with lock:
            engine.step()
            state = engine.state()
        if state.open_update is None:
            break
        assert time.monotonic() < deadline, "the update of a dead trainer stays open"
        time.sleep(0.05)
    with lock:
        want = {0: old, 1: trained(FIRST_SEED), 2: trained(SECOND_SEED)}
        assert state.version <= (2 if stage == "commit" else int(late))
        if mode != "in_place":
            assert logprob_gap(engine, want[state.version], "served") < 1e-4
        model = tiny_hf("qwen2", seed=60, tie_word_embeddings=True)
        options = PushOptions(transport="nccl", bucket_bytes=4096, timeout_s=60.0)
        with Publisher(model, [engine], options) as publisher:
            publisher.push(3)
        assert logprob_gap(engine, model, "next") < 1e-4
