"""Sources whose tensors do not last: one buffer for all, or gathered one at a time."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from msgspec.structs import replace

from engine.errors import ManifestMismatch
from engine.protocol import TensorSpec
from tests.helpers.engines import make_replica
from tests.helpers.tiny_models import tiny_hf, write_tiny
from tests.trainer_bridge.test_push import logprob_gap
from trainer_bridge.adapters.plain import PlainSource
from trainer_bridge.bridge import Publisher, PushOptions
from trainer_bridge.update_target import state_of

TRANSPORTS = ["inproc", "nccl", "cuda_ipc", "disk", "delta"]


class ReusedBuffer(PlainSource):
    """Writes every tensor into the same memory, which is spoiled when the last was read."""

    lasting = False

    def specs(self) -> list[TensorSpec]:
        return PlainSource(self._model).specs()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        largest = max(p.numel() for p in self._model.parameters())
        buffer = torch.empty(largest)
        for name, tensor in PlainSource(self._model).tensors():
            view = buffer[: tensor.numel()].view(tensor.shape)
            view.copy_(tensor)
            yield name, view
            buffer.fill_(float("nan"))


class Gathered(ReusedBuffer):
    """New memory for every tensor, as a gather takes it; counts what is held at once."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self.alive: list[weakref.ref[torch.UntypedStorage]] = []
        self.most = 0

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in PlainSource(self._model).tensors():
            whole = tensor.clone()
            self.alive.append(weakref.ref(whole.untyped_storage()))
            self.most = max(self.most, sum(ref() is not None for ref in self.alive))
            yield name, whole
            del whole


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return folder, write_tiny(folder, "qwen2", tie_word_embeddings=True)


def trained(seed: int) -> torch.nn.Module:
    return tiny_hf("qwen2", seed=seed, tie_word_embeddings=True)


def options(transport: str, **fields) -> PushOptions:
    return PushOptions(transport=transport, bucket_bytes=4096, timeout_s=30.0, **fields)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
def test_a_buffer_that_is_used_again_is_read_in_time(tiny, transport: str, mode: str) -> None:
    model = trained(1)
    with (
        make_replica(tiny[0]) as ours,
        make_replica(tiny[0]) as exact,
        Publisher(ReusedBuffer(model), [ours], options(transport, mode=mode)) as publisher,
        Publisher(model, [exact], options("inproc")) as reference,
    ):
        for version in (1, 2):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.01)
            publisher.push(version)
            reference.push(version)
            assert checksums(ours) == checksums(exact)


def checksums(replica) -> dict[str, int]:
    from engine.protocol import CheckWeights

    return replica.send(CheckWeights()).weights[0].checksums


@pytest.mark.parametrize("transport", ["inproc", "nccl", "cuda_ipc"])
@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
def test_gathered_tensors_are_held_one_at_a_time(tiny, transport: str, mode: str) -> None:
    source = Gathered(trained(2))
    with (
        make_replica(tiny[0]) as replica,
        Publisher(source, [replica], options(transport, mode=mode)) as publisher,
    ):
        publisher.push(1)
        assert logprob_gap(replica, source._model, "r") < 1e-4
    assert len(source.alive) > 10
    assert source.most <= 2, "the one that is read, and the one that is made"


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("how", ["ends early", "another name", "another shape", "raises"])
def test_a_source_that_is_not_what_it_announced_moves_nothing(tiny, transport, how: str) -> None:
    class Wrong(ReusedBuffer):
        wrong = False

        def tensors(self):
            for place, (name, tensor) in enumerate(super().tensors()):
                if self.wrong and place == 7:
                    if how == "ends early":
                        return
                    if how == "raises":
                        raise ConnectionResetError("the gather broke")
                    name = name if how == "another shape" else name.replace("weight", "bias")
                    tensor = tensor.reshape(-1) if how == "another shape" else tensor
                yield name, tensor

    source = Wrong(trained(3))
    with (
        make_replica(tiny[0]) as replica,
        Publisher(source, [replica], options(transport, mode="shadow")) as publisher,
    ):
        source.wrong = True
        with pytest.raises(ConnectionResetError if how == "raises" else ManifestMismatch):
            publisher.push(1)
        assert state_of(replica).open_update is None
        assert logprob_gap(replica, tiny[1], "old") < 1e-4
        source.wrong = False
        publisher.push(1)
        assert logprob_gap(replica, source._model, "new") < 1e-4


def test_a_manifest_in_another_order_is_noticed(tiny) -> None:
    """Equal shapes, so that nothing but the names can tell them apart."""

    class Swapped(PlainSource):
        def specs(self):
            specs = super().specs()
            names = [spec.name for spec in specs]
            one, two = (names.index(f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 1))
            specs[one] = replace(specs[one], name=names[two])
            specs[two] = replace(specs[two], name=names[one])
            return specs

    with (
        make_replica(tiny[0]) as replica,
        Publisher(Swapped(trained(4)), [replica], options("nccl")) as publisher,
        pytest.raises(ManifestMismatch, match=r"where it announced model\.layers\.1\.mlp\.up"),
    ):
        publisher.push(1)
