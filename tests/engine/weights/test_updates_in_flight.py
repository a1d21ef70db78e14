"""Broadcast updates of a whole engine while requests run: they wait, and go on as they should."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from engine.errors import GroupError, NoVersion, UpdateOrder
from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    CheckWeights,
    CommitUpdate,
    JoinGroup,
    ReceiveBroadcast,
)
from tests.helpers.engines import drain, make_replica, request
from tests.helpers.tiny_models import tiny_hf, write_tiny
from tests.helpers.weight_engines import pieces, send, specs
from trainer_bridge.process_group import SenderGroup

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_tiny(path, "qwen2", tie_word_embeddings=True)
    return path


@pytest.fixture
def new() -> dict[str, torch.Tensor]:
    model = tiny_hf("qwen2", seed=1, tie_word_embeddings=True)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def join(replica: Any) -> SenderGroup:
    sender = SenderGroup("g", world_size=2, backend="gloo", timeout_s=60.0)
    command = JoinGroup(
        name="g",
        address=sender.address,
        port=sender.port,
        rank_offset=1,
        world_size=2,
        backend="gloo",
        timeout_s=60.0,
    )
    with ThreadPoolExecutor(1) as pool:
        connected = pool.submit(sender.connect)
        replica.send(command)
        connected.result(60)
    return sender


def receive(replica: Any, sender: SenderGroup, new: dict[str, torch.Tensor], count: int) -> None:
    """Have the replica receive everything and the sender send `count` tensors, then leave."""
    command = ReceiveBroadcast(group="g", tensors=pieces(new), layout="tensors", timeout_s=60.0)

    def act() -> None:
        send(sender, list(new.values())[:count])
        if count < len(new):
            sender.abort()

    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(act)
        try:
            replica.send(command)
        finally:
            sent.result(60)


@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place", "auto"])
def test_running_requests_wait_for_the_commit_and_go_on(folder, new, mode: str) -> None:
    with make_replica(folder) as replica:
        if mode == "auto":
            # No memory for a shadow: the ranks decide on in place, and the leader must know.
            replica._leader._executor._worker._weights.session._free = lambda _device: 0
        sender = join(replica)
        replica.submit([request("r", PROMPT, seed=1, max_new_tokens=12)])
        for _ in range(4):
            replica.step()
        replica.send(BeginUpdate(version=1, manifest=specs(new), mode=mode))
        receive(replica, sender, new, len(new))
        for _ in range(3):
            assert all(output.finish is None for output in replica.step())
        replica.send(CommitUpdate(version=1))
        output = drain(replica)["r"]
        assert output.finish.type == "length"
        assert [span.version for span in output.spans] == [0, 1]
        with make_replica(folder) as other:
            other.update_weights_inproc(BeginUpdate(version=1), new.items())
            [mine] = replica.send(CheckWeights()).weights
            [theirs] = other.send(CheckWeights()).weights
        assert mine.checksums == theirs.checksums
        sender.close()


@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
def test_a_sender_that_dies_leaves_the_engine_as_stated(folder, new, mode: str) -> None:
    with make_replica(folder) as replica, make_replica(folder) as untouched:
        for each in (replica, untouched):
            each.submit([request("before", PROMPT, seed=1)])
        assert list(drain(replica)["before"].token_ids) == list(
            drain(untouched)["before"].token_ids
        )
        sender = join(replica)
        replica.send(BeginUpdate(version=1, manifest=specs(new), mode=mode))
        with pytest.raises(GroupError, match="rank 0 of group 'g' is gone"):
            receive(replica, sender, new, 5)
        replica.send(AbortUpdate(version=1))
        for each in (replica, untouched):
            each.submit([request("after", PROMPT, seed=2)])
        after = drain(replica)["after"]
        if mode != "in_place":
            want = drain(untouched)["after"]
            assert list(after.token_ids) == list(want.token_ids)
            assert list(after.logprobs) == list(want.logprobs), "bit for bit"
        else:
            assert after.finish.error == NoVersion.__name__
            assert "written in place" in replica.state().refusal
        sender = join(replica)
        replica.send(BeginUpdate(version=2, manifest=specs(new), mode=mode))
        receive(replica, sender, new, len(new))
        replica.send(CommitUpdate(version=2))
        replica.submit([request("again", PROMPT, seed=2)])
        assert drain(replica)["again"].finish.type == "length"
        assert replica.state().refusal == ""
        sender.close()


def test_an_undone_update_lets_requests_go_on_without_the_trainer(folder, new) -> None:
    """Its trainer is gone, so nobody aborts it: at once when the transfer breaks, and at the
    deadline when the trainer only stalls."""
    with make_replica(folder) as replica, make_replica(folder) as untouched:
        for rid, timeout_s, count in (("broken", 60.0, 5), ("stalled", 1.0, len(new))):
            sender = join(replica)
            replica.submit([request(rid, PROMPT, seed=1, max_new_tokens=12)])
            for _ in range(4):
                replica.step()
            begin = BeginUpdate(version=1, manifest=specs(new), mode="undo", timeout_s=timeout_s)
            replica.send(begin)
            if count < len(new):
                with pytest.raises(GroupError, match="rank 0 of group 'g' is gone"):
                    receive(replica, sender, new, count)
            else:
                receive(replica, sender, new, count)
                assert "writes in place" in replica.state().refusal
                time.sleep(timeout_s)
            untouched.submit([request(rid, PROMPT, seed=1, max_new_tokens=12)])
            after, want = drain(replica)[rid], drain(untouched)[rid]
            assert list(after.token_ids) == list(want.token_ids)
            assert list(after.logprobs) == list(want.logprobs), "bit for bit"
            assert replica.state().refusal == ""
            with pytest.raises(UpdateOrder, match="without an open update"):
                replica.send(CommitUpdate(version=1))
            sender.close()
