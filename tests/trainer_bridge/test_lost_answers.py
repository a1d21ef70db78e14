"""Commands that never reach the engine: the same publisher goes on, with whatever version."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from engine.errors import EngineDead
from engine.protocol import AbortUpdate, Command, CommitUpdate, LoadFromDisk, PrepareUpdate, Reply
from rollout.replica.inline import InlineReplica
from tests.helpers.engines import make_replica
from tests.helpers.tiny_models import tiny_hf, write_tiny
from tests.trainer_bridge.test_push import logprob_gap
from trainer_bridge.bridge import Publisher, PushOptions

pytestmark = pytest.mark.slow


class Lossy:
    """A target that some commands do not reach. lost: their types."""

    def __init__(self, replica: InlineReplica) -> None:
        self._replica = replica
        self.lost: Collection[type] = ()

    def send(self, command: Command) -> Reply:
        """See `UpdateTarget`."""
        if type(command) in self.lost:
            raise EngineDead(f"{type(command).__name__} is lost", field="url")
        return self._replica.send(command)


@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
@pytest.mark.parametrize(
    ("transport", "lost"),
    [
        ("disk", CommitUpdate),
        ("disk", LoadFromDisk),
        ("delta", CommitUpdate),
        ("nccl", CommitUpdate),
        ("cuda_ipc", CommitUpdate),
    ],
)
def test_a_publisher_takes_the_place_of_its_own_lost_update(
    tmp_path, transport, lost, mode
) -> None:
    old = write_tiny(tmp_path, "qwen2", tie_word_embeddings=True)
    new = tiny_hf("qwen2", seed=7, tie_word_embeddings=True)
    options = PushOptions(transport=transport, mode=mode)
    with make_replica(tmp_path, num_pages=32) as replica:
        target = Lossy(replica)
        with Publisher(old, [target], options) as publisher:
            publisher.push(1)
            publisher._source = type(publisher._source)(new)
            target.lost = (lost, AbortUpdate)
            with pytest.raises(EngineDead, match="is lost"):
                publisher.push(5)
            assert replica.state().open_update == 5
            assert replica.state().version == 1
            target.lost = ()
            # Whatever the trainer calls it: it may have gone back to a checkpoint.
            publisher.push(4)
        assert (replica.state().version, replica.state().open_update) == (4, None)
        assert logprob_gap(replica, new, "new") < 1e-4


def test_a_fleet_whose_prepare_and_aborts_are_lost_takes_the_next_version(tmp_path) -> None:
    write_tiny(tmp_path, "qwen2", tie_word_embeddings=True)
    new = tiny_hf("qwen2", seed=7, tie_word_embeddings=True)
    with make_replica(tmp_path, num_pages=32) as one, make_replica(tmp_path, num_pages=32) as two:
        targets = [Lossy(one), Lossy(two)]
        with Publisher(new, targets, PushOptions(transport="nccl")) as publisher:
            targets[0].lost = (AbortUpdate,)
            targets[1].lost = (PrepareUpdate, AbortUpdate)
            with pytest.raises(EngineDead, match="engine 1"):
                publisher.push(1)
            assert [engine.state().open_update for engine in (one, two)] == [1, 1]
            targets[0].lost = targets[1].lost = ()
            publisher.push(2)
        for engine in (one, two):
            assert engine.state().version == 2
            assert logprob_gap(engine, new, "new") < 1e-4
