"""A reference whose weights are where it computes only while it does."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from recipes.trainers.base import Learner
from recipes.trainers.reference import HostReference, reference_of
from recipes.world import World, open_world
from tests.helpers import trainer_ranks as ranks
from tests.helpers.tiny_models import tiny_hf

IDS = torch.tensor([[1, 2, 3]])


def test_it_computes_elsewhere_and_stays_in_host_memory() -> None:
    """The device that holds no numbers stands for any other one."""
    elsewhere = torch.device("meta")
    model = tiny_hf("llama")
    before = [(p, p.data_ptr()) for p in model.parameters()]
    reference = reference_of(model, elsewhere, on_host=True)
    for _ in range(2):
        with reference as entered:
            assert entered.device == elsewhere
            assert entered(input_ids=IDS.to(elsewhere)).logits.device == elsewhere
        for parameter, at in before:
            assert parameter.device.type == "cpu" and parameter.data_ptr() == at
        with pytest.raises(AssertionError, match="in host memory"):
            reference(input_ids=IDS)  # type: ignore[operator]


def test_a_pass_that_fails_leaves_nothing_behind() -> None:
    reference = HostReference(tiny_hf("llama"), torch.device("cpu"))
    with pytest.raises(RuntimeError, match="broke"), reference:
        raise RuntimeError("it broke")
    assert not reference._moved


def test_a_copy_is_the_model_itself() -> None:
    model = tiny_hf("llama")
    with reference_of(model, torch.device("cpu"), on_host=False) as entered:
        assert entered is model


@pytest.fixture
def gpu_world() -> Iterator[World]:
    world = open_world(device="cuda", needs_group=True, colocated=True)
    yield world
    world.close()


BUILD: dict[str, Callable[[World, torch.device, bool], Learner]] = {
    "plain": lambda world, gpu, on_host: ranks.plain(device=gpu, on_host=on_host),
    "fsdp": lambda world, gpu, on_host: ranks.fsdp(world, device=gpu, on_host=on_host),
    "zero1": lambda world, gpu, on_host: ranks.deepspeed(world, 1, device=gpu, on_host=on_host),
    "zero3": lambda world, gpu, on_host: ranks.deepspeed(world, 3, device=gpu, on_host=on_host),
}


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", BUILD)
def test_a_gpu_has_no_memory_taken_between_passes(gpu_world: World, name: str) -> None:
    if name.startswith("zero"):
        pytest.importorskip("deepspeed", exc_type=ImportError)
    gpu = torch.device("cuda", 0)
    trajectories = ranks.batch(0).trajectories
    scored, taken = [], []
    for on_host in (False, True):
        gc.collect()
        before = torch.cuda.memory_allocated()
        trainer = BUILD[name](gpu_world, gpu, on_host)
        for _ in range(2):
            scored.append(np.concatenate(trainer.reference_logprobs(trajectories)))
        taken.append(torch.cuda.memory_allocated() - before)
        del trainer
    assert all(np.array_equal(scored[0], other) for other in scored[1:])
    weights = sum(p.numel() * p.element_size() for p in ranks.model().parameters())
    assert taken[1] <= taken[0] - weights / 2
