"""What a sender announces is what the engine finds."""

from __future__ import annotations

import pytest
import torch

from engine.protocol import TensorSpec
from engine.weights.checksum import checksum
from trainer_bridge.checksum import with_checksums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (7, 5), (1 << 12, 3), (0,)])
def test_both_ends_compute_the_same(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    spec = TensorSpec("w", str(dtype).removeprefix("torch."), list(shape))
    (announced,) = with_checksums([spec], [("w", tensor)])
    assert announced.checksum == checksum(tensor)
    assert (announced.name, announced.shape) == ("w", list(shape))


def test_every_tensor_gets_its_own() -> None:
    tensors = {"a": torch.randn(5), "b": torch.randn(3, 7), "c": torch.empty(0)}
    specs = [TensorSpec(name, "float32", list(t.shape)) for name, t in tensors.items()]
    announced = with_checksums(specs, tensors.items())
    assert [(s.name, s.checksum) for s in announced] == [
        (name, checksum(tensor)) for name, tensor in tensors.items()
    ]


def test_nothing_to_announce() -> None:
    assert with_checksums([], []) == []


def check_devices(devices: list[str]) -> None:
    """Tensors on several devices in turn, none of which need be the current one."""
    values = [torch.randn(100, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    specs = [TensorSpec(str(i), "float32", [100]) for i in range(6)]
    lying = [(str(i), v.to(devices[i % len(devices)])) for i, v in enumerate(values)]
    announced = with_checksums(specs, lying)
    assert [spec.checksum for spec in announced] == [checksum(value) for value in values]
    assert {name: checksum(tensor) for name, tensor in lying} == {
        spec.name: spec.checksum for spec in announced
    }


@pytest.mark.gpu
def test_a_model_that_lies_partly_in_host_memory() -> None:
    check_devices(["cpu", "cuda"])


@pytest.mark.multi_gpu
def test_a_model_that_lies_on_several_gpus() -> None:
    check_devices(["cuda:1", "cpu", "cuda:0"])
