"""A trainer that is not ours: it forms its group as OpenRLHF, slime and AReaL do."""

from __future__ import annotations

import pickle
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _new_process_group_helper, _world
from torch.distributed.rendezvous import rendezvous

from engine.comm.nccl import Communicator, new_unique_id
from rollout.client import Client
from tests.helpers.foreign_classes import foreign_classes


def free_port() -> int:
    """A port nobody listens at right now."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


class PackageTrainer:
    """Rank 0 as vLLM's trainer package has it: an NCCL id in a store, a raw communicator."""

    def __init__(self, client: Client, device: torch.device) -> None:
        self._client = client
        self._device = device
        self._threads = ThreadPoolExecutor(1)
        self._stream = torch.cuda.Stream(device)
        self._communicator: Communicator | None = None

    def join(self) -> None:
        """Form the group of this rank and the engine's."""
        store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=False
        )
        info = {
            "master_address": "127.0.0.1",
            "master_port": store.port,
            "rank_offset": 1,
            "world_size": 2,
        }
        body = {"init_info": info}
        asked = self._threads.submit(self._client.call, "/init_weight_transfer_engine", body)
        unique_id = new_unique_id()
        with foreign_classes() as classes:
            named = classes.ncclUniqueId.from_buffer_copy(unique_id)
            store.set("broadcast_from/0/0", pickle.dumps(named))
        deadline = time.monotonic() + 60
        with torch.cuda.device(self._device):
            self._communicator = Communicator(unique_id, rank=0, world_size=2, deadline=deadline)
            one = torch.zeros(1, device=self._device)
            self._communicator.sum_one(
                one.data_ptr(), stream=self._stream.cuda_stream, deadline=deadline
            )
        self._stream.synchronize()
        asked.result(60)
        self._store = store

    def send(self, tensors: Sequence[tuple[str, torch.Tensor]], *, packed: bool) -> None:
        """start, update beside the broadcasts, finish."""
        info = {
            "names": [name for name, _ in tensors],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
            "shapes": [list(tensor.shape) for _, tensor in tensors],
            "packed": packed,
        }
        self._client.call("/start_weight_update", {})
        asked = self._threads.submit(self._client.call, "/update_weights", {"update_info": info})
        assert self._communicator is not None, "send before join"
        torch.cuda.synchronize(self._device)
        for buffer in _buffers(tensors, "flattened_bucket" if packed else None):
            raw = buffer.reshape(-1).view(torch.uint8)
            with torch.cuda.device(self._device):
                self._communicator.broadcast(
                    raw.data_ptr(),
                    raw.nbytes,
                    root=0,
                    stream=self._stream.cuda_stream,
                    deadline=time.monotonic() + 60,
                )
        self._stream.synchronize()
        asked.result(60)
        self._client.call("/finish_weight_update", {})

    def close(self) -> None:
        """Leave the group."""
        if self._communicator is not None:
            self._communicator.abort()
        self._threads.shutdown()


class ForeignTrainer:
    """Rank 0 of a group with the `num_ranks` ranks of an engine, which join over `client`."""

    def __init__(
        self, client: Client, name: str, *, num_ranks: int = 1, backend: str = "gloo"
    ) -> None:
        self._client = client
        self._name = name
        self._size = num_ranks + 1
        self._backend = backend
        self._threads = ThreadPoolExecutor(2)
        self._group: Any = None

    def join(self) -> None:
        """Form the group: the POST and the rendezvous at the same time."""
        port = free_port()
        body = {
            "master_address": "127.0.0.1",
            "master_port": str(port),
            "rank_offset": 1,
            "world_size": self._size,
            "group_name": self._name,
            "backend": self._backend,
        }
        asked = self._threads.submit(self._client.call, "/init_weights_update_group", body)
        timeout = timedelta(seconds=60)
        store, _, _ = next(rendezvous(f"tcp://127.0.0.1:{port}", 0, self._size, timeout=timeout))
        keys = PrefixStore(self._name, store)
        self._group, _ = _new_process_group_helper(
            self._size, 0, [], self._backend, keys, group_name=self._name, timeout=timeout
        )
        _world.pg_group_ranks[self._group] = {rank: rank for rank in range(self._size)}
        assert asked.result(60)["success"]

    def send(self, tensors: Sequence[tuple[str, torch.Tensor]], **options: Any) -> Any:
        """One call with these tensors, and their broadcasts."""
        body = {
            "names": [name for name, _ in tensors],
            "dtypes": [str(tensor.dtype) for _, tensor in tensors],
            "shapes": [list(tensor.shape) for _, tensor in tensors],
            "group_name": self._name,
            **options,
        }
        asked = self._threads.submit(self._client.call, "/update_weights_from_distributed", body)
        for buffer in _buffers(tensors, options.get("load_format")):
            dist.broadcast(buffer, src=0, group=self._group, async_op=True).wait()
        if self._backend == "nccl":
            torch.cuda.synchronize()
        return asked.result(60)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
        self._threads.shutdown()


def _buffers(
    tensors: Sequence[tuple[str, torch.Tensor]], load_format: str | None
) -> list[torch.Tensor]:
    if load_format != "flattened_bucket":
        return [tensor.contiguous() for _, tensor in tensors]
    return [torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensor in tensors])]
