"""Where the engines of a run are, and what is refused."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from engine.errors import InvalidRequest, SlipstreamError
from engine.protocol import ReleaseMemory, ResumeMemory
from recipes.actors import launch
from recipes.actors.actor import InlineActor
from recipes.actors.launch import engine_config, launch_actor, launch_reference
from recipes.algorithms.presets import AlgorithmOptions
from recipes.settings.options import PlacementOptions, RolloutOptions, RunOptions
from recipes.trainers.model import load_trainer
from recipes.world import World
from rollout.offline import generate
from tests.helpers.engines import request
from tests.helpers.tiny_models import tiny_hf, write_tiny
from tests.helpers.trajectories import trajectory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, "llama")
    return str(folder)


def options(model: str, **placement: Any) -> RunOptions:
    return RunOptions(
        model=model,
        device="cpu",
        dtype="float32",
        rollout=RolloutOptions(kv_memory_gb=0.02),
        placement=PlacementOptions(**placement),
    )


@contextmanager
def launch_actor_of(asked: RunOptions) -> Iterator[InlineActor]:
    actor = launch_actor(asked)
    assert isinstance(actor, InlineActor)
    try:
        yield actor
    finally:
        actor.close()


def test_drafts_are_paced_by_counts() -> None:
    """Never by the clock, so that a seed repeats a run."""
    for method in ("off", "auto", "ngram"):
        rollout = RolloutOptions(speculative=method, draft_tokens=5)
        found = engine_config(RunOptions(rollout=rollout)).speculative
        assert (found.method, found.draft_tokens, found.pace) == (method, 5, "counts")
    assert engine_config(RunOptions()).speculative.method == "off"


def test_the_engine_stores_what_the_rollout_asks_for() -> None:
    assert engine_config(RunOptions()).quantization == "none"
    rollout = RolloutOptions(rollout_quantization="int8")
    assert engine_config(RunOptions(rollout=rollout)).quantization == "int8"


def test_a_cpu_run_sleeps_only_when_asked(model: str) -> None:
    for asked, saver in ((None, False), (True, True), (False, False)):
        with launch_actor_of(options(model, sleep=asked)) as actor:
            actor.sleep()
            assert bool(actor.state().released) == saver


def test_a_gpu_run_sleeps_where_the_library_is(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = dataclasses.replace(options("m"), device="cuda")
    for found in (object(), None):
        monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name, f=found: f)
        assert launch._sleeps(gpu) == (found is not None)


@pytest.mark.slow
def test_a_reference_engine_is_there_where_a_kl_wants_one(model: str) -> None:
    """Its weights are those of the trainer at its start, its temperature that of the rollouts."""
    asked = dataclasses.replace(
        options(model), rollout=RolloutOptions(kv_memory_gb=0.02, temperature=0.7)
    )
    for without in ({"reference": "engine"}, {"kl_coef": 0.1}):
        objective = AlgorithmOptions(**without)
        assert launch_reference(dataclasses.replace(asked, objective=objective)) is None
    objective = AlgorithmOptions(kl_coef=0.1, reference="engine")
    asked = dataclasses.replace(asked, objective=objective)
    prompt = np.arange(3, 9, dtype=np.int32)
    sequences = (trajectory(prompt, [4, 5, 6]), trajectory(prompt, [4]))
    with launch_actor_of(asked) as actor:
        trainer = load_trainer(asked, actor)
        engine = launch_reference(asked)
        assert engine is not None
        for found, expected in zip(
            engine.logprobs(sequences), trainer.logprobs(sequences), strict=True
        ):
            np.testing.assert_allclose(found, expected, atol=2e-5)
        engine.close()
        with pytest.raises(AssertionError):
            trainer.reference_logprobs(sequences)


def test_a_push_wakes_the_weights_first(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    new = tiny_hf("llama", seed=1)
    with launch_actor_of(options(model, sleep=True)) as actor:
        sent: list[Any] = []
        send = actor.replica.send

        def watched(command: Any) -> Any:
            sent.append(command)
            return send(command)

        monkeypatch.setattr(actor.replica, "send", watched)
        actor.sleep()
        actor.sleep()
        assert actor.push(new, 1, measure_memcpy=False).version == 1
        kinds = [ReleaseMemory(), ResumeMemory(tags=["weights"])]
        assert sent == [*kinds, ResumeMemory(tags=["kv_cache", "cuda_graph"])]
        slept = actor.generate([request("slept", [5, 6, 7])])
    with launch_actor_of(options(model)) as awake:
        awake.push(new, 1, measure_memcpy=False)
        (never,) = generate(awake.replica, [request("never", [5, 6, 7])])
    assert slept[0].token_ids.tolist() == never.token_ids.tolist()


def test_too_few_gpus_are_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert launch._first_rollout_gpu(2, 2) == 2
    for engines, trainers in ((4, 1), (2, 3)):
        with pytest.raises(InvalidRequest, match="more than the 4 there are") as caught:
            launch._first_rollout_gpu(engines, trainers)
        assert caught.value.field == "rollout_gpus"


def test_the_engine_is_on_the_gpu_of_its_rank(model: str) -> None:
    assert engine_config(options(model), gpu=3).parallel.base_gpu == 3


def test_plain_is_one_process(model: str) -> None:
    with (
        launch_actor_of(options(model)) as actor,
        pytest.raises(InvalidRequest, match="plain is one process") as caught,
    ):
        load_trainer(options(model), actor, World(rank=0, size=2))
    assert caught.value.field == "trainer"


def test_missing_deepspeed_says_how_to_get_it(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    asked = options(model, trainer="deepspeed", zero=3)
    with (
        launch_actor_of(asked) as actor,
        pytest.raises(SlipstreamError, match=r"slipstream\[train\]") as caught,
    ):
        load_trainer(asked, actor)
    assert caught.value.field == "trainer"


@pytest.mark.parametrize(
    ("prompts", "samples", "wanted"), [(8, 8, 256), (64, 8, 512), (64, 16, 1024), (512, 16, 1024)]
)
def test_a_step_runs_in_one_wave_where_that_is_reasonable(
    prompts: int, samples: int, wanted: int
) -> None:
    rollout = RolloutOptions(prompts_per_step=prompts, samples=samples)
    assert engine_config(RunOptions(rollout=rollout)).scheduler.max_running == wanted


def test_the_trainers_memory_is_planned_for() -> None:
    placement = PlacementOptions(trainer_memory_gb=1.5)
    memory = engine_config(RunOptions(placement=placement)).memory
    assert memory.trainer_training_bytes == 3 << 29
