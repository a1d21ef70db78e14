"""Handles of shared memory: given again for the same memory, made anew for any other."""

from __future__ import annotations

import pytest
import torch

from engine.protocol import IpcBuffer
from trainer_bridge.transports.handles import HandleCache


class Exporter:
    """Makes numbered handles, and says which allocation an address is in."""

    def __init__(self) -> None:
        self.num_exported = 0
        self.epoch = 0

    def export(self, storage: torch.UntypedStorage) -> IpcBuffer:
        self.num_exported += 1
        return IpcBuffer(kind="cuda", size=storage.nbytes(), handle=bytes([self.num_exported]))

    def allocation(self, address: int) -> int:
        return self.epoch


@pytest.fixture
def exporter() -> Exporter:
    return Exporter()


@pytest.fixture
def handles(exporter: Exporter) -> HandleCache:
    return HandleCache(exporter.export, exporter.allocation)


def test_a_storage_is_exported_once_whatever_object_asks(handles, exporter) -> None:
    tensor = torch.zeros(8)
    first = handles.buffer_of(tensor.untyped_storage())
    assert handles.buffer_of(tensor[2:].untyped_storage()) is first
    assert exporter.num_exported == 1


def test_a_new_storage_at_the_same_address_gets_a_handle_of_its_own(handles, exporter) -> None:
    """The memory stays; the storages over it do not, as after an offload and reload."""
    memory = bytearray(64)
    before = torch.frombuffer(memory, dtype=torch.uint8)
    address = before.data_ptr()
    first = handles.buffer_of(before.untyped_storage())
    del before
    after = torch.frombuffer(memory, dtype=torch.uint8)
    assert (after.data_ptr(), after.nbytes) == (address, 64)
    assert handles.buffer_of(after.untyped_storage()) != first
    assert exporter.num_exported == 2


def test_memory_that_was_allocated_again_gets_a_new_handle(handles, exporter) -> None:
    """The same storage and address, as `resize_` to nothing and back can give."""
    tensor = torch.zeros(8)
    first = handles.buffer_of(tensor.untyped_storage())
    exporter.epoch += 1
    assert handles.buffer_of(tensor.untyped_storage()) != first


def test_handles_keep_no_storage_and_go_with_it(handles, exporter) -> None:
    kept, freed = torch.zeros(8), torch.zeros(16)
    for tensor in (kept, freed):
        handles.buffer_of(tensor.untyped_storage())
    del tensor, freed
    handles.forget_freed()
    assert len(handles) == 1
    handles.buffer_of(kept.untyped_storage())
    assert exporter.num_exported == 2
    handles.clear()
    assert len(handles) == 0
