"""A delta is sent only on top of what it was made against, whatever number that has."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from engine.errors import UpdateOrder
from engine.protocol import DELTA_FILE, CheckWeights, LoadFromDisk
from tests.helpers.engines import make_replica
from tests.helpers.tiny_models import tiny_hf, write_tiny
from tests.trainer_bridge.test_push import logprob_gap
from trainer_bridge.bridge import Publisher, PushOptions, push

LOGGER = "trainer_bridge.transports.disk"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, "qwen2", tie_word_embeddings=True)
    return folder


def trained(seed: int) -> torch.nn.Module:
    return tiny_hf("qwen2", seed=seed, tie_word_embeddings=True)


def train(model: torch.nn.Module) -> None:
    """A step that changes one tensor of many."""
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)


class Address:
    """Where an engine listens: another one may take its place. deltas: of each load, whether
    the folder was one."""

    def __init__(self, replica) -> None:
        self.replica = replica
        self.sent: list[type] = []
        self.deltas: list[bool] = []
        self.silent = False

    def send(self, command):
        self.sent.append(type(command))
        if isinstance(command, LoadFromDisk):
            self.deltas.append((Path(command.path) / DELTA_FILE).is_file())
        if self.silent and isinstance(command, CheckWeights):
            raise UpdateOrder("not now", field="x")
        return self.replica.send(command)


def deltas_to(*engines: Address) -> list[list[bool]]:
    return [engine.deltas for engine in engines]


def publisher_of(model: torch.nn.Module, *engines: Address) -> Publisher:
    return Publisher(model, engines, PushOptions(transport="delta"))


def test_another_trainers_weights_under_the_same_number_are_replaced_whole(tiny, caplog) -> None:
    model = trained(1)
    with make_replica(tiny) as one, make_replica(tiny) as two, make_replica(tiny) as other:
        first, second = Address(one), Address(two)
        with publisher_of(model, first, second) as publisher:
            publisher.push(1)
            push(trained(2), 1, other)
            second.replica = other
            train(model)
            with caplog.at_level(logging.WARNING, LOGGER):
                publisher.push(2)
            for place, replica in enumerate((one, other)):
                assert logprob_gap(replica, model, f"whole{place}") < 1e-4
            assert deltas_to(first, second) == [[False, False]] * 2
            [said] = [record.message for record in caplog.records if record.name == LOGGER]
            assert "sent whole" in said and "engine 1" in said and "other weights" in said
            train(model)
            publisher.push(3)
            for place, replica in enumerate((one, other)):
                assert logprob_gap(replica, model, f"delta{place}") < 1e-4
        assert deltas_to(first, second) == [[False, False, True]] * 2


def test_a_trainer_that_was_started_again_begins_whole(tiny) -> None:
    with make_replica(tiny) as replica:
        engine = Address(replica)
        with publisher_of(trained(1), engine) as before:
            before.push(1)
        model = trained(2)
        with publisher_of(model, engine) as after:
            after.push(2)
            assert logprob_gap(replica, model, "r") < 1e-4
        assert engine.deltas == [False, False]


def test_an_engine_that_was_started_again_and_fed_by_the_next_trainer(tiny) -> None:
    """The trainer before it is not gone, and goes on."""
    old, new = trained(1), trained(2)
    with make_replica(tiny) as one, make_replica(tiny) as again:
        engine = Address(one)
        with publisher_of(old, engine) as before, publisher_of(new, engine) as after:
            before.push(1)
            engine.replica = again
            after.push(1)
            train(old)
            before.push(2)
            assert logprob_gap(again, old, "r") < 1e-4
        assert engine.deltas == [False, False, False]


@pytest.mark.parametrize("silent", ["after the commit", "before the delta"])
def test_what_is_not_known_to_be_there_is_sent_whole(tiny, silent: str, caplog) -> None:
    model = trained(1)
    with make_replica(tiny) as replica:
        engine = Address(replica)
        with publisher_of(model, engine) as publisher:
            engine.silent = silent == "after the commit"
            publisher.push(1)
            engine.silent = silent == "before the delta"
            train(model)
            with caplog.at_level(logging.WARNING, LOGGER):
                publisher.push(2)
            assert logprob_gap(replica, model, "r") < 1e-4
        assert engine.deltas == [False, False]
        assert "the engine" in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_update_asks_twice_what_an_engine_holds(tiny, dtype: str) -> None:
    """Whatever the engine makes of what it is sent, it is compared with itself."""
    model = trained(1)
    with make_replica(tiny, dtype=dtype) as replica:
        engine = Address(replica)
        with publisher_of(model, engine) as publisher:
            for version in (1, 2, 3):
                engine.sent.clear()
                publisher.push(version)
                train(model)
                assert engine.sent.count(CheckWeights) == (1 if version == 1 else 2)
        assert engine.deltas == [False, True, True]
