"""Real engines and peers that keep a rendezvous waiting: tokens go on, and what was asked ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
from engine.errors import GroupError, WeightUpdateError
from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    CommitUpdate,
    JoinGroup,
    ReceiveBroadcast,
    TensorPiece,
)
from rollout.replica.inline import InlineReplica
from rollout.replica.leader import Leader
from tests.helpers import peers
from tests.helpers.engines import drain, make_replica, request
from tests.helpers.peers import listening, until
from tests.helpers.thread_ranks import ThreadedExecutor
from tests.helpers.tiny_models import tiny_hf, write_tiny
from trainer_bridge.process_group import SenderGroup

pytestmark = pytest.mark.slow

PROMPT = [3, 14, 15, 92, 65]
NUM_TOKENS = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny(folder, "llama", seed=0, max_position_embeddings=2048)
    return folder


def two_ranks(model: Path) -> InlineReplica:
    config = EngineConfig(
        model=str(model),
        device="cpu",
        dtype="float32",
        cache=CacheConfig(num_pages=400, page_size=8),
        scheduler=SchedulerConfig(max_running=8, check_integrity=True),
        parallel=ParallelConfig(tp_size=2, timeout_s=60.0),
    )
    return InlineReplica(config, ThreadedExecutor(config))


@pytest.fixture(params=["one rank", "two ranks"])
def replica(request: pytest.FixtureRequest, model: Path) -> Iterator[InlineReplica]:
    made = make_replica(model) if request.param == "one rank" else two_ranks(model)
    with made as found:
        yield found


def weights(seed: int) -> list[tuple[str, torch.Tensor]]:
    made = tiny_hf("llama", seed, max_position_embeddings=2048)
    return [(name, parameter.detach()) for name, parameter in made.named_parameters()]


def leader_of(replica: InlineReplica) -> Leader:
    return replica._leader


def alone(replica: InlineReplica, count: int) -> list[int]:
    """What the engine samples when nothing else goes on."""
    replica.submit([request("alone", PROMPT, temperature=0.0, max_new_tokens=count)])
    return drain(replica)["alone"].token_ids.tolist()


def generate(replica: InlineReplica, count: int) -> list[int]:
    replica.submit([request("beside", PROMPT, temperature=0.0, max_new_tokens=count)])
    found: dict[str, Any] = {}
    while "beside" not in found:
        found |= {o.rid: o for o in replica.step() if o.finish is not None}
    return found["beside"].token_ids.tolist()


@pytest.mark.parametrize("act", [peers.silent, peers.slow, peers.cunning], ids=lambda a: a.__name__)
def test_tokens_go_on_while_a_peer_keeps_a_group_waiting(
    replica: InlineReplica, act: peers.Act
) -> None:
    expected = alone(replica, NUM_TOKENS)
    tp_size = replica.state().tp_size
    with listening(act) as port:
        command = JoinGroup(
            name="g",
            address="127.0.0.1",
            port=port,
            rank_offset=1,
            world_size=1 + tp_size,
            backend="gloo",
            timeout_s=1.5,
        )
        ticket = leader_of(replica).start(command)
        assert generate(replica, NUM_TOKENS) == expected
        assert replica.state().receiving in (["join_group"], [])
        until(lambda: (leader_of(replica).poll(), ticket.done())[1])
        with pytest.raises(GroupError, match=f"127.0.0.1:{port}"):
            ticket.result()
    assert generate(replica, NUM_TOKENS) == expected


def form(replica: InlineReplica) -> SenderGroup:
    """A group of this process as the trainer, and the replica's ranks."""
    size = 1 + replica.state().tp_size
    sender = SenderGroup("g", world_size=size, backend="gloo", timeout_s=60.0)
    connecting = threading.Thread(target=sender.connect)
    connecting.start()
    replica.send(
        JoinGroup(
            name="g",
            address=sender.address,
            port=sender.port,
            rank_offset=1,
            world_size=size,
            backend="gloo",
            timeout_s=60.0,
        )
    )
    connecting.join(60)
    return sender


def pieces(named: list[tuple[str, torch.Tensor]]) -> list[TensorPiece]:
    return [TensorPiece(name, "float32", list(tensor.shape)) for name, tensor in named]


def test_tokens_go_on_while_a_trainer_is_silent_and_the_update_can_be_aborted(
    replica: InlineReplica,
) -> None:
    expected = alone(replica, NUM_TOKENS)
    sender = form(replica)
    new = weights(1)
    replica.send(BeginUpdate(version=1, mode="shadow"))
    receive = ReceiveBroadcast(group="g", tensors=pieces(new), layout="tensors", timeout_s=60.0)
    ticket = leader_of(replica).start(receive)
    # Half of it comes; the old version serves, bit for bit.
    for _, tensor in new[: len(new) // 2]:
        sender.broadcast(tensor.contiguous())
    assert generate(replica, NUM_TOKENS) == expected
    assert not ticket.done()
    replica.send(AbortUpdate(version=1))
    with pytest.raises(WeightUpdateError, match="aborted"):
        ticket.result()
    assert generate(replica, NUM_TOKENS) == expected
    assert replica.state().open_update is None
    sender.close()


def test_an_update_received_beside_steps_serves_from_its_commit_on(
    replica: InlineReplica,
) -> None:
    old = alone(replica, NUM_TOKENS)
    sender = form(replica)
    new = weights(1)
    replica.send(BeginUpdate(version=1, mode="shadow"))
    receive = ReceiveBroadcast(group="g", tensors=pieces(new), layout="tensors", timeout_s=60.0)
    ticket = leader_of(replica).start(receive)
    assert generate(replica, NUM_TOKENS) == old
    works = [sender.broadcast(tensor.contiguous()) for _, tensor in new]
    until(lambda: (leader_of(replica).poll(), ticket.done())[1])
    assert len(works) == len(new)
    assert generate(replica, NUM_TOKENS) == old
    replica.send(CommitUpdate(version=1))
    fresh = generate(replica, NUM_TOKENS)
    assert fresh != old
    assert replica.state().version == 1
    # What a replica says that took them in process.
    if replica.state().tp_size == 1:
        replica.update_weights_inproc(BeginUpdate(version=2), weights(1))
        assert generate(replica, NUM_TOKENS) == fresh
    sender.close()
