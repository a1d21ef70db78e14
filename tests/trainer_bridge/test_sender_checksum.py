"""The sender's checksum is the engine's: two texts of one definition."""

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


def test_chunks_of_the_sender_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer_bridge import checksum as sender

    monkeypatch.setattr(sender, "_CHUNK", 10)
    tensor = torch.randn(101)
    (announced,) = with_checksums([TensorSpec("w", "float32", [101])], [("w", tensor)])
    assert announced.checksum == checksum(tensor)


def test_nothing_to_announce() -> None:
    assert with_checksums([], []) == []
