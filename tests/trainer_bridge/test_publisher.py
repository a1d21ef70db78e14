"""A `Publisher` over every transport, from a trainer's model to what the engine then samples."""

from __future__ import annotations

import socket
import threading

import pytest
import torch
from msgspec.structs import replace

from engine.errors import ChecksumMismatch, GroupError, ManifestMismatch, UnsupportedOption
from engine.protocol import AbortUpdate, BeginUpdate, JoinGroup, LeaveGroup, ReceiveBroadcast
from tests.helpers.engines import make_replica
from tests.helpers.tiny_models import tiny_hf, write_tiny
from tests.trainer_bridge.test_push import logprob_gap
from trainer_bridge.adapters.deepspeed import DeepSpeedSource
from trainer_bridge.adapters.plain import PlainSource
from trainer_bridge.bridge import Publisher, PushOptions
from trainer_bridge.process_group import SenderGroup
from trainer_bridge.update_target import state_of


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return folder, write_tiny(folder, "qwen2", tie_word_embeddings=True)


def trained(seed: int) -> torch.nn.Module:
    return tiny_hf("qwen2", seed=seed, tie_word_embeddings=True)


def options(transport: str, **changes) -> PushOptions:
    return PushOptions(transport=transport, bucket_bytes=4096, timeout_s=20.0, **changes)


@pytest.mark.parametrize("transport", ["inproc", "disk", "delta", "nccl", "cuda_ipc"])
def test_update_after_update_arrives(tiny, transport: str) -> None:
    model = trained(1)
    with (
        make_replica(tiny[0]) as replica,
        Publisher(model, [replica], options(transport)) as publisher,
    ):
        for version in (1, 2, 3):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.01 * version)
            report = publisher.push(version)
            assert report.version == version
            assert logprob_gap(replica, model, f"r{version}") < 1e-4
        assert state_of(replica).version == 3


@pytest.mark.parametrize("transport", ["nccl", "cuda_ipc", "disk"])
def test_two_replicas_take_one_update(tiny, transport: str) -> None:
    model = trained(2)
    with (
        make_replica(tiny[0]) as first,
        make_replica(tiny[0]) as second,
        Publisher(model, [first, second], options(transport)) as publisher,
    ):
        publisher.push(5)
        for replica in (first, second):
            assert logprob_gap(replica, model, "r") < 1e-4
            assert state_of(replica).version == 5


@pytest.mark.parametrize("transport", ["inproc", "nccl", "cuda_ipc"])
def test_checksums_are_verified(tiny, transport: str, monkeypatch) -> None:
    old, new = tiny[1], trained(3)
    from trainer_bridge import bridge

    honest = bridge.with_checksums

    def corrupt(specs, tensors):
        announced = honest(specs, tensors)
        announced[2] = replace(announced[2], checksum=announced[2].checksum ^ 1)
        return announced

    with (
        make_replica(tiny[0]) as replica,
        Publisher(new, [replica], options(transport, checksums=True)) as publisher,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(bridge, "with_checksums", corrupt)
            with pytest.raises(ChecksumMismatch, match=PlainSource(new).specs()[2].name):
                publisher.push(1)
        assert logprob_gap(replica, old, "old") < 1e-4
        publisher.push(2)
        assert logprob_gap(replica, new, "new") < 1e-4


def test_a_delta_carries_only_what_changed(tiny, tmp_path) -> None:
    from safetensors import safe_open

    from trainer_bridge.transports.disk import DiskCarrier

    model = trained(4)
    source = PlainSource(model)
    with make_replica(tiny[0]) as replica:
        carrier = DiskCarrier([replica], tmp_path, delta=True, keep=True)
        from trainer_bridge.transports.base import publish

        publish(carrier, BeginUpdate(version=1, manifest=source.specs()), source)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        publish(carrier, BeginUpdate(version=2, manifest=source.specs()), source)
        assert logprob_gap(replica, model, "r") < 1e-4
    with safe_open(tmp_path / "weight_v000002" / "model.safetensors", "pt") as file:
        assert list(file.keys()) == ["model.layers.0.mlp.up_proj.weight"]


def test_a_tensor_the_engine_lacks_fails_and_the_next_push_works(tiny) -> None:
    class Wrong(PlainSource):
        def specs(self):
            return [
                replace(spec, name=spec.name.replace("up_proj", "u")) for spec in super().specs()
            ]

    old, new = tiny[1], trained(5)
    with make_replica(tiny[0]) as replica:
        with (
            Publisher(Wrong(new), [replica], options("nccl")) as publisher,
            pytest.raises(ManifestMismatch, match=r"mlp\.u\.weight"),
        ):
            publisher.push(1)
        assert logprob_gap(replica, old, "old") < 1e-4
        with Publisher(new, [replica], options("nccl")) as publisher:
            publisher.push(1)
        assert logprob_gap(replica, new, "new") < 1e-4


def test_a_port_in_use_is_named(tiny) -> None:
    with socket.socket() as taken, make_replica(tiny[0]) as replica:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            Publisher(trained(1), [replica], options("nccl", port=port)) as publisher,
            pytest.raises(GroupError, match=str(port)),
        ):
            publisher.push(1)
        assert state_of(replica).open_update is None


def test_a_rank_that_never_joins_is_named() -> None:
    group = SenderGroup("g", world_size=3, backend="gloo", timeout_s=0.2)
    with pytest.raises(GroupError, match="rank 1, 2 of 3"):
        group.connect()


def test_inproc_reaches_one_engine_of_this_process(tiny) -> None:
    with (
        make_replica(tiny[0]) as first,
        make_replica(tiny[0]) as second,
        pytest.raises(UnsupportedOption, match="inproc"),
    ):
        Publisher(trained(1), [first, second], options("inproc")).push(1)


def test_a_sender_that_dies_between_buckets_leaves_the_old_version(tiny) -> None:
    """The engine waits for a bucket that never comes; then a new group serves it."""
    old, new = tiny[1], trained(6)
    source = PlainSource(new)
    from trainer_bridge.adapters.base import whole_piece

    with make_replica(tiny[0]) as replica:
        group = SenderGroup("dying", world_size=2, backend="gloo", timeout_s=60.0)
        join = JoinGroup(
            name="dying",
            address="127.0.0.1",
            port=group.port,
            rank_offset=1,
            world_size=2,
            backend="gloo",
            timeout_s=60.0,
        )
        joining = threading.Thread(target=replica.send, args=(join,))
        joining.start()
        group.connect()
        joining.join()
        replica.send(BeginUpdate(version=1, manifest=source.specs()))
        pieces = [whole_piece(spec) for spec in source.specs()]
        receive = ReceiveBroadcast(group="dying", tensors=pieces, bucket_bytes=4096, timeout_s=1.0)
        failure: list[Exception] = []

        def run() -> None:
            try:
                replica.send(receive)
            except Exception as error:
                failure.append(error)

        receiving = threading.Thread(target=run)
        receiving.start()
        receiving.join(60)
        assert not receiving.is_alive() and "dying" in str(failure[0])
        replica.send(AbortUpdate(version=1))
        replica.send(LeaveGroup(name="dying"))
        assert logprob_gap(replica, old, "old") < 1e-4
        with Publisher(new, [replica], options("nccl")) as publisher:
            publisher.push(2)
        assert logprob_gap(replica, new, "new") < 1e-4


def test_a_module_that_an_engine_of_deepspeed_wraps_is_read_by_its_adapter() -> None:
    class DeepSpeedEngine(torch.nn.Linear):
        """By its name, as `source_of` tells them."""

    assert isinstance(Publisher(DeepSpeedEngine(2, 2), [])._source, DeepSpeedSource)
    assert isinstance(Publisher(torch.nn.Linear(2, 2), [])._source, PlainSource)
