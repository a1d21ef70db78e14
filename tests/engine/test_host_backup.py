"""The host copy of released tensors."""

from __future__ import annotations

import pytest
import torch

from engine.host_backup import HostBackup


def check_round_trips(device: str) -> None:
    tensors = [
        torch.randn(7, 9, device=device),
        torch.randn(33, device=device).to(torch.bfloat16),
        torch.tensor(5, device=device),
        torch.zeros(0, device=device),
    ]
    want = [tensor.clone() for tensor in tensors]
    backup = HostBackup(tensors)
    for turn in range(2):
        backup.save()
        backup.wait()
        for tensor in tensors:
            tensor.fill_(-1)
        backup.restore()
        backup.wait()
        assert all(torch.equal(a, b) for a, b in zip(tensors, want, strict=True)), turn
        tensors[0].add_(1)
        want[0].add_(1)
    assert backup.num_bytes == 4 * 256 - 256


def test_values_come_back() -> None:
    check_round_trips("cpu")


@pytest.mark.gpu
def test_values_come_back_to_a_gpu() -> None:
    check_round_trips("cuda")


@pytest.mark.gpu
def test_the_buffer_is_pinned() -> None:
    """`is_pinned` knows only memory that torch allocated; the driver gives back what it pinned."""
    backup = HostBackup([torch.zeros(8, device="cuda")])
    address, runtime = backup._buffer.data_ptr(), torch.cuda.cudart()
    assert int(runtime.cudaHostUnregister(address)) == 0
    # As it was, for the backup's own end.
    assert int(runtime.cudaHostRegister(address, backup._buffer.nbytes, 0)) == 0
