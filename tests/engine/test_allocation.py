"""Weights sit in their region; what no update brings back does not."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from engine.allocation import _measure, allocate_model, other_tensors, parameter_bytes
from engine.config import MemoryConfig
from engine.layers.runtime import LayerRuntime
from engine.models.locate import locate
from engine.occupancy import Occupancy
from tests.helpers.tiny_models import write_tiny

RUNTIME = LayerRuntime(device=torch.device("cpu"), dtype=torch.float32, backend="torch")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, "qwen2", tie_word_embeddings=True)
    return locate(str(folder), "auto").config


class WatchedOccupancy(Occupancy):
    """Knows which storages were there when the region ended."""

    inside = False

    @contextmanager
    def region(self, tag, *, num_bytes: int = 0):
        self.inside = True
        yield
        self.inside = False


def test_rotary_tables_leave_the_region(config, monkeypatch) -> None:
    occupancy = WatchedOccupancy(MemoryConfig(saver=True), torch.device("cpu"))
    made_outside: list[int] = []
    real = torch.Tensor.clone

    def clone(tensor: torch.Tensor, **options: object) -> torch.Tensor:
        copy = real(tensor, **options)
        if not occupancy.inside:
            made_outside.append(copy.data_ptr())
        return copy

    monkeypatch.setattr(torch.Tensor, "clone", clone)
    model = allocate_model(config, runtime=RUNTIME, max_position=32, occupancy=occupancy)
    others = other_tensors(model)
    assert [tuple(table.shape) for table in others] == [(32, config.head_dim)]
    assert {table.data_ptr() for table in others} <= set(made_outside)
    rotary = model.model.layers[0].self_attn.rotary.cos_sin_MD
    before = rotary.clone()
    occupancy.release([])
    occupancy.resume([])
    assert torch.equal(rotary, before) and rotary.any()
    assert not any(parameter.any() for parameter in model.parameters())


def test_buffers_and_plain_attributes_are_found_and_parameters_are_not() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("scale", torch.ones(1))
    module.table = torch.ones(2)
    found = {id(tensor) for tensor in other_tensors(nn.Sequential(module))}
    assert found == {id(module.scale), id(module.table)}


def test_measuring_counts_what_building_allocates(config) -> None:
    model = allocate_model(
        config,
        runtime=RUNTIME,
        max_position=32,
        occupancy=Occupancy(MemoryConfig(), RUNTIME.device),
    )
    exact = parameter_bytes(model) + sum(tensor.nbytes for tensor in other_tensors(model))
    count = len(list(model.parameters())) + 1
    assert exact <= _measure(config, RUNTIME, 32) < exact + 512 * count
