"""The ways in which tensors reach one rank, each as the receive step of an update."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Protocol
from unittest import mock

import torch
from torch.distributed import HashStore

from engine.errors import WeightUpdateError
from engine.protocol import (
    IpcBuffer,
    IpcPayload,
    IpcTensor,
    LeaveGroup,
    LoadFromDisk,
    ReceiveBroadcast,
    ReceiveExcerpts,
    ReceiveIpc,
    TensorPiece,
    encode,
)
from engine.weights import trainer_store
from engine.weights.service import WeightService
from tests.helpers.excerpt_senders import Senders, cut_among
from tests.helpers.peers import until
from tests.helpers.weight_engines import Tensors, join, pieces, send, split
from trainer_bridge import process_group
from trainer_bridge.process_group import SenderGroup
from trainer_bridge.transports.disk import write

PATIENCE_S = 60.0
"""For one message: the first operation under a dispatch mode imports much of torch."""


class Carrier(Protocol):
    """One way; `prepare` before the fault is armed, `receive` under it, `recover` after it."""

    def prepare(self, new: Tensors) -> None:
        """Have the sender's side ready."""

    def receive(self) -> None:
        """The engine's command."""

    def recover(self) -> None:
        """Begin anew after a failure."""


class InProcess:
    """Tensors of this process. consumed: one buffer, written anew for every tensor."""

    def __init__(self, rank: WeightService, *, consumed: bool) -> None:
        self._rank = rank
        self._consumed = consumed
        self._new: Tensors = {}

    def prepare(self, new: Tensors) -> None:
        self._new = {name: tensor.clone() for name, tensor in new.items()}

    def receive(self) -> None:
        tensors = self._reused() if self._consumed else iter(self._new.items())
        self._rank.session.receive(tensors, lasting=not self._consumed)

    def recover(self) -> None:
        pass

    def _reused(self) -> Iterator[tuple[str, torch.Tensor]]:
        buffer = torch.empty(max(tensor.numel() for tensor in self._new.values()))
        for name, tensor in self._new.items():
            part = buffer[: tensor.numel()].view(tensor.shape)
            part.copy_(tensor)
            yield name, part
            buffer.fill_(7.0)


class Disk:
    """A safetensors folder that is gone once the command has answered."""

    def __init__(self, rank: WeightService, folder: Path) -> None:
        self._rank = rank
        self._path = folder / "weights"
        self._written: list[tuple[Tensors, bytes]] = []

    def prepare(self, new: Tensors) -> None:
        self._file.write_bytes(self._bytes_of(new))

    def receive(self) -> None:
        self._rank.handle(LoadFromDisk(path=str(self._path)))
        self._file.write_bytes(b"gone")

    def recover(self) -> None:
        pass

    @property
    def _file(self) -> Path:
        return self._path / "model.safetensors"

    def _bytes_of(self, new: Tensors) -> bytes:
        """What a trainer writes, once for each set of weights: it waits for the disk."""
        for tensors, data in self._written:
            if tensors is new:
                return data
        write(self._path, new.items())
        self._written.append((new, self._file.read_bytes()))
        return self._written[-1][1]


class _OwnStore(HashStore):
    """In place of a TCPStore, whose client asks the resolver for names that no group needs:
    where that is slow, for seconds."""

    port = 1


class GlooGroup:
    """Broadcasts of a trainer's group, half a tensor at a time, from a thread of its own.

    A group lasts until a transfer over it fails. Its ends meet in this process, since it is not
    the rendezvous that faults are put into: `test_peers.py` is about that.
    """

    def __init__(self, rank: WeightService) -> None:
        self._rank = rank
        self._sender: SenderGroup | None = None
        self._pool = ThreadPoolExecutor(1)
        self._sent: Future[None] | None = None
        self._halves: list[tuple[TensorPiece, torch.Tensor]] = []
        self._whole = True

    def prepare(self, new: Tensors) -> None:
        if self._sender is None:
            store = _OwnStore()
            with (
                mock.patch.object(process_group, "_listen", lambda *_: store),
                mock.patch.object(trainer_store, "connect", lambda *_: store),
            ):
                self._sender = join([self._rank], timeout_s=PATIENCE_S)
        self._halves = [half for share in split(new, 2) for half in share if half[1].numel()]

    def receive(self) -> None:
        assert self._sender is not None
        self._whole = False
        halves = [half for _, half in self._halves]
        self._sent = self._pool.submit(send, self._sender, halves, PATIENCE_S)
        named = [piece for piece, _ in self._halves]
        self._rank.handle(
            ReceiveBroadcast(group="g", tensors=named, layout="tensors", timeout_s=PATIENCE_S)
        )
        self._whole = True

    def recover(self) -> None:
        # A fault before or after the transfer leaves the group as it is.
        if not self._whole:
            self._end()

    def _end(self) -> None:
        self._rank.handle(LeaveGroup(name="g"))
        # The engine keeps its end until gloo lets go of it, so the sender's closes first.
        if self._sender is not None:
            self._sender.close()
        # Asking has it look at once. The back end lets go at the latest when the message that was
        # under way has had its time.
        until(lambda: self._rank.groups.num_parked == 0, 2 * PATIENCE_S)
        if self._sent is not None:
            with suppress(WeightUpdateError, AssertionError, ValueError):
                self._sent.result(120)
        self._sender = self._sent = None
        self._whole = True

    def close(self) -> None:
        """Leave the group, and end the thread."""
        self._end()
        self._pool.shutdown()


class Excerpts:
    """What the rank takes of each tensor, planned anew for every update, from a sender's thread.
    Its ends meet as those of `GlooGroup` do."""

    def __init__(self, rank: WeightService) -> None:
        self._rank = rank
        self._world: Senders | None = None
        self._sent: list[Future[None]] = []
        self._new: Tensors = {}
        self._whole = True

    def prepare(self, new: Tensors) -> None:
        if self._world is None:
            store = _OwnStore()
            with (
                mock.patch.object(process_group, "_listen", lambda *_: store),
                mock.patch.object(trainer_store, "connect", lambda *_: store),
            ):
                self._world = Senders([self._rank], 1, timeout_s=PATIENCE_S)
        self._new = new

    def receive(self) -> None:
        assert self._world is not None
        self._whole = False
        announced = self._rank.session.require_open("receive").announced.values()
        self._world.plan(list(announced), cut_among(self._new, 1, by="flat"))
        self._sent = self._world.sends()
        self._rank.handle(ReceiveExcerpts(group="g", timeout_s=PATIENCE_S))
        self._whole = True

    def recover(self) -> None:
        if not self._whole:
            self.close()

    def close(self) -> None:
        """Leave the group, and end its threads."""
        self._rank.handle(LeaveGroup(name="g"))
        if self._world is not None:
            for end in self._world.ends:
                end.group.close()
            until(lambda: self._rank.groups.num_parked == 0, 2 * PATIENCE_S)
            for sent in self._sent:
                with suppress(WeightUpdateError, AssertionError):
                    sent.result(120)
            self._world.close()
        self._world, self._sent, self._whole = None, [], True


class SharedMemoryIpc:
    """A block of POSIX shared memory that is overwritten once the command has answered."""

    def __init__(self, rank: WeightService) -> None:
        self._rank = rank
        self._block: SharedMemory | None = None
        self._payload = b""

    def prepare(self, new: Tensors) -> None:
        size = sum(tensor.nbytes for tensor in new.values())
        if self._block is None:
            self._block = SharedMemory(create=True, size=size)
        entries, offset = [], 0
        for piece, tensor in zip(pieces(new), new.values(), strict=True):
            data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            self._block.buf[offset : offset + len(data)] = data
            entries.append(IpcTensor(piece.name, piece.dtype, piece.shape, 0, offset))
            offset += len(data)
        self._payload = encode(IpcPayload([IpcBuffer("shm", size, name=self._block.name)], entries))

    def receive(self) -> None:
        assert self._block is not None
        self._rank.handle(ReceiveIpc(payloads=[self._payload]))
        self._block.buf[:] = bytes(len(self._block.buf))

    def recover(self) -> None:
        pass

    def close(self) -> None:
        """Give the block back."""
        self._rank.close()
        if self._block is not None:
            with suppress(BufferError):
                self._block.close()
            self._block.unlink()


NAMES = ("lent", "consumed", "disk", "group", "excerpts", "summed", "shm")


def make(name: str, rank: WeightService, folder: Path) -> Carrier:
    """The carrier of this name."""
    match name:
        case "lent" | "consumed":
            return InProcess(rank, consumed=name == "consumed")
        case "disk":
            return Disk(rank, folder)
        case "group":
            return GlooGroup(rank)
        case "excerpts" | "summed":
            return Excerpts(rank)
        case _:
            return SharedMemoryIpc(rank)
