"""Log-probabilities of given sequences from an engine of its own."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import ContextTooLong, EngineDead, ModelError
from recipes.actors.scorer import ScoringEngine, scoring_config
from recipes.settings.options import RunOptions
from recipes.types import Trajectory
from recipes.world import World
from rollout.replica.base import Replica
from rollout.replica.spawned import ProcessReplica
from tests.helpers.engines import exact_logprobs, make_replica
from tests.helpers.thread_world import in_world
from tests.helpers.tiny_models import tiny_hf, write_tiny
from tests.helpers.trajectories import trajectory

CONTEXT = 32
TEMPERATURE = 0.7
CONFIG = scoring_config(RunOptions(), "unused", kv_memory_gb=1.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, "llama")
    return folder


def replica(folder: Path) -> Replica:
    return make_replica(folder, context_length=CONTEXT, max_chunk_tokens=8)


def scorer(folder: Path, world: World | None = None, **changes: Any) -> ScoringEngine:
    given = {"option": "teacher", "temperature": TEMPERATURE, "launch": lambda: replica(folder)}
    return ScoringEngine(CONFIG, world, **{**given, **changes})


def sequences() -> list[Trajectory]:
    """Two replies to one prompt, a reply of one token, and one that fills the context."""
    prompt = np.arange(3, 15, dtype=np.int32)
    short = np.array([7], dtype=np.int32)
    return [
        trajectory(prompt, [4, 5, 6, 2]),
        trajectory(prompt, [4, 9]),
        trajectory(short, [11]),
        trajectory(short, [(5 * i) % 90 + 3 for i in range(CONTEXT - 1)]),
    ]


def expected(sequence: Trajectory) -> np.ndarray:
    model = tiny_hf("llama")
    ids = sequence.prompt_ids.tolist(), sequence.response_ids.tolist()
    return exact_logprobs(model, *ids, temperature=TEMPERATURE)


def test_the_logprobs_are_those_of_the_response_tokens_at_the_temperature(tiny: Path) -> None:
    engine = scorer(tiny)
    asked = sequences()
    for _ in range(2):
        found = engine.logprobs(asked)
        assert [array.dtype for array in found] == [np.float32] * len(asked)
        for array, sequence in zip(found, asked, strict=True):
            np.testing.assert_allclose(array, expected(sequence), atol=2e-5)
    assert engine.logprobs([]) == ()
    engine.close()


def test_a_call_leaves_no_cached_prefix(tiny: Path) -> None:
    engine = scorer(tiny)
    first = engine.logprobs(sequences())
    assert engine._engine is not None and engine._engine.state().cached_pages == 0
    again = engine.logprobs(sequences())
    assert [a.tolist() for a in first] == [a.tolist() for a in again]
    engine.close()


def test_a_sequence_too_long_is_an_error_of_the_option(tiny: Path) -> None:
    engine = scorer(tiny)
    long = trajectory(np.arange(3, 10, dtype=np.int32), [5] * CONTEXT)
    with pytest.raises(ContextTooLong, match=r"^teacher: ") as caught:
        engine.logprobs([long])
    assert caught.value.field == "teacher"
    engine.close()


class Mortal:
    """A replica that dies at a step, and stays dead."""

    def __init__(self, folder: Path, dies_at: int) -> None:
        self._replica = replica(folder)
        self._steps_left = dies_at

    def __getattr__(self, name: str) -> Any:
        if name == "step":
            self._steps_left -= 1
        if self._steps_left < 0 and name != "close":
            raise EngineDead("it was killed", field="leader")
        return getattr(self._replica, name)


@pytest.mark.parametrize("lives", [[0, 99], [2, 99]])
def test_an_engine_that_dies_is_started_again(tiny: Path, lives: list[int]) -> None:
    left = iter(lives)
    engine = scorer(tiny, launch=lambda: Mortal(tiny, next(left)))
    found = engine.logprobs(sequences())
    np.testing.assert_allclose(found[0], expected(sequences()[0]), atol=2e-5)
    assert next(left, None) is None
    engine.close()


def test_an_engine_that_dies_again_ends_the_call(tiny: Path) -> None:
    left = iter([0, 0, 99])
    engine = scorer(tiny, launch=lambda: Mortal(tiny, next(left)))
    with pytest.raises(EngineDead, match=r"teacher: .*died again.*it was killed") as caught:
        engine.logprobs(sequences())
    assert caught.value.field == "teacher"
    assert next(left) == 99
    engine.close()


def test_all_processes_have_what_the_main_one_was_told(tiny: Path) -> None:
    launched = []

    def act(world: World) -> tuple[Any, str]:
        def launch() -> Replica:
            launched.append(world.rank)
            return replica(tiny)

        engine = scorer(tiny, world, launch=launch)
        found = engine.logprobs(sequences())
        long = trajectory(np.arange(3, 10, dtype=np.int32), [5] * CONTEXT)
        with pytest.raises(ContextTooLong) as caught:
            engine.logprobs([long])
        engine.close()
        return [array.tolist() for array in found], caught.value.field

    first, second = in_world(2, act)
    assert first == second and first[1] == "teacher"
    assert launched == [0]


def test_a_model_that_is_not_there_is_an_error_in_all_processes(tmp_path: Path) -> None:
    config = scoring_config(RunOptions(device="cpu"), str(tmp_path), kv_memory_gb=0.01)

    def act(world: World) -> str:
        with pytest.raises(ModelError, match=r"^teacher: ") as caught:
            ScoringEngine(config, world, option="teacher", temperature=1.0)
        return caught.value.field

    assert in_world(2, act) == ["teacher", "teacher"]


@pytest.mark.slow
def test_the_engine_is_a_process_and_one_that_is_killed_is_replaced(tiny: Path) -> None:
    options = RunOptions(device="cpu", dtype="float32")
    config = scoring_config(options, str(tiny), kv_memory_gb=0.01)
    engine = ScoringEngine(config, option="teacher", temperature=TEMPERATURE)
    assert engine._engine is not None
    process = engine._engine._replica
    assert isinstance(process, ProcessReplica)
    before = engine.logprobs(sequences())
    os.kill(process._process.pid, signal.SIGKILL)
    after = engine.logprobs(sequences())
    assert [a.tolist() for a in before] == [a.tolist() for a in after]
    assert engine._engine._replica is not process
    engine.close()
