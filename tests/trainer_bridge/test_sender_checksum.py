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
