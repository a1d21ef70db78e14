"""Tensors of this process: read as they come, unless their source says that they last."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch

from engine.errors import OutOfMemory, WeightUpdateError
from engine.protocol import BeginUpdate
from tests.helpers.weight_engines import Tensors, assert_holds, contents, fresh, make_rank, specs

MODES = ["shadow", "undo", "in_place"]


def gathered(new: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """A trainer that gathers every tensor into one buffer."""
    buffer = torch.empty(max(tensor.numel() for tensor in new.values()))
    for name, tensor in new.items():
        part = buffer[: tensor.numel()].view(tensor.shape)
        part.copy_(tensor)
        yield name, part
        buffer.fill_(torch.nan)


@pytest.mark.parametrize("mode", MODES)
def test_a_source_may_use_its_buffer_again(mode: str) -> None:
    model, rank = make_rank()
    new = fresh(model)
    rank.session.begin(BeginUpdate(version=4, manifest=specs(new), mode=mode))
    rank.session.receive(gathered(new))
    rank.session.commit(4)
    assert_holds(model, new)


@pytest.mark.parametrize("mode", MODES)
def test_no_tensor_is_held_while_the_next_is_made(mode: str) -> None:
    model, rank = make_rank()
    new = fresh(model)
    alive: list[int] = []

    def source() -> Iterator[tuple[str, torch.Tensor]]:
        made: list[weakref.ref[torch.Tensor]] = []
        for name in new:
            tensor = new[name].clone()
            made.append(weakref.ref(tensor))
            pair = (name, tensor)
            del tensor
            yield pair
            del pair
            alive.append(sum(ref() is not None for ref in made))

    rank.session.begin(BeginUpdate(version=4, mode=mode))
    rank.session.receive(source())
    assert alive == [0] * len(new)
    rank.session.commit(4)
    assert_holds(model, new)


@pytest.mark.parametrize("mode", MODES)
def test_lasting_tensors_are_not_copied_before_the_commit(mode: str) -> None:
    model, rank = make_rank()
    before, new = contents(model), fresh(model)
    rank.session.begin(BeginUpdate(version=4, mode=mode))
    rank.session.receive(new.items(), lasting=True)
    assert_holds(model, before)
    rank.session.require_servable()
    for tensor in new.values():
        tensor.add_(1.0)
    rank.session.commit(4)
    assert_holds(model, new)


@pytest.mark.parametrize("mode", MODES)
def test_a_source_that_dies_ends_the_update(mode: str) -> None:
    model, rank = make_rank()
    before, new = contents(model), fresh(model)

    def dies() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(new.items())[:5]
        raise ConnectionResetError("the trainer is gone")

    rank.session.begin(BeginUpdate(version=4, mode=mode))
    with pytest.raises(ConnectionResetError):
        rank.session.receive(dies())
    assert rank.session.open_version is None
    if mode == "in_place":
        with pytest.raises(WeightUpdateError, match="mixture"):
            rank.session.require_servable()
    else:
        assert_holds(model, before)
        rank.session.require_servable()
    rank.session.begin(BeginUpdate(version=4, mode=mode))
    rank.session.receive(new.items())
    rank.session.commit(4)
    assert_holds(model, new)
    rank.session.require_servable()


def test_memory_that_runs_out_has_a_type() -> None:
    _, rank = make_rank()

    def dies() -> Iterator[tuple[str, torch.Tensor]]:
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    rank.session.begin(BeginUpdate(version=4))
    with pytest.raises(OutOfMemory, match="version 4"):
        rank.session.receive(dies())
    rank.session.require_servable()
