"""A trainer rank of `benchmarks/weight_update.py`: random weights, published again and again."""

from __future__ import annotations

import math
import os
import socket
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.protocol import BeginUpdate, Command, Reply, StagingMode, TensorPiece, TensorSpec
from kernels.torch_compat import TCPStore
from trainer_bridge.adapters.base import WeightSource
from trainer_bridge.adapters.deepspeed import DeepSpeedSource
from trainer_bridge.bridge import Publisher, PushOptions
from trainer_bridge.stored import check_stored
from trainer_bridge.transports.sharded import ShardedCarrier

Tensors = list[tuple[str, str, tuple[int, ...]]]
RAW_WAIT = timedelta(seconds=120)


@dataclass(frozen=True, kw_only=True)
class TrainerJob:
    """One rank's orders. port: of the trainers' own group; raw_port: of the floor's."""

    rank: int
    world_size: int
    port: int
    raw_port: int
    device: str
    gpu: int
    tensors: Tensors
    transport: str
    updates: int
    cycles: int
    checksums: bool
    mode: StagingMode
    zero3: bool
    way: str
    check: bool

    @property
    def is_sharded(self) -> bool:
        """Whether every rank sends its part."""
        return self.world_size > 1 or bool(self.way)

    def torch_device(self) -> torch.device:
        """Where the weights are."""
        return torch.device("cuda", self.gpu) if self.device == "cuda" else torch.device("cpu")


class TensorList:
    """A `WeightSource` of random tensors; with several ranks each holds its part of all."""

    lasting = True

    def __init__(self, job: TrainerJob) -> None:
        self._rank, self._world_size = job.rank, job.world_size
        generator = torch.Generator(job.torch_device()).manual_seed(1)
        self._tensors = []
        for name, dtype, shape in job.tensors:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=job.torch_device())
            self._tensors.append((name, tensor.normal_(0.0, 0.02, generator=generator)))

    @staticmethod
    def num_bytes_of(tensors: Tensors) -> int:
        return sum(math.prod(s) * getattr(torch, d).itemsize for _, d, s in tensors)

    def specs(self) -> list[TensorSpec]:
        return [
            TensorSpec(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
            for name, tensor in self._tensors
        ]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._tensors)

    def shards(self) -> Iterator[tuple[TensorPiece, torch.Tensor]]:
        for spec, (name, tensor) in zip(self.specs(), self._tensors, strict=True):
            size = tensor.numel()
            part = -(-size // self._world_size)
            start, stop = min(self._rank * part, size), min((self._rank + 1) * part, size)
            if start < stop:
                piece = TensorPiece(name, spec.dtype, spec.shape, start, stop)
                yield piece, tensor.view(-1)[start:stop]


class Tree(torch.nn.Module):
    """Parameters under dotted names, and nothing that computes."""

    def add(self, path: list[str], parameter: torch.nn.Parameter) -> None:
        if len(path) == 1:
            self.register_parameter(path[0], parameter)
            return
        if path[0] not in self._modules:
            self.add_module(path[0], Tree())
        child = self.get_submodule(path[0])
        assert isinstance(child, Tree)
        child.add(path[1:], parameter)


def zero3_source(job: TrainerJob) -> WeightSource:
    """The same tensors as the parameters of a module that DeepSpeed has partitioned."""
    import deepspeed

    # Its collective for CPU ranks is compiled at first use; gloo needs no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    tree = Tree()
    for name, tensor in TensorList(job).tensors():
        tree.add(name.split("."), torch.nn.Parameter(tensor, requires_grad=False))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": job.device == "cuda"},
    }
    engine, *_ = deepspeed.initialize(model=tree, config=config)
    return DeepSpeedSource(engine)


class PipeTarget:
    """An engine at the other end of a pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def send(self, command: Command) -> Reply:
        self._pipe.send(("command", command))
        reply = self._pipe.recv()
        if isinstance(reply, Exception):
            raise reply
        assert isinstance(reply, Reply)
        return reply


class RawGroup:
    """Two ranks and nothing but a broadcast from trainer 0 (rank 0): the floor of 'nccl'."""

    def __init__(self, rank: int, port: int, device: torch.device) -> None:
        self._device = device
        store = TCPStore("127.0.0.1", port, is_master=rank == 0, timeout=RAW_WAIT)
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            self._group: Any = dist.ProcessGroupNCCL(store, rank, 2, options)
        else:
            self._group = dist.ProcessGroupGloo(store, rank, 2, RAW_WAIT)
        self._store = store

    def measure(self, num_bytes: int) -> float:
        """Seconds of one broadcast of a flat buffer, median of 5 after a warm-up."""
        buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
        times = []
        for _ in range(6):
            started = time.perf_counter()
            self._group.broadcast([buffer], dist.BroadcastOptions()).wait()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    def __enter__(self) -> RawGroup:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._device.type == "cuda":
            self._group.shutdown()


def run_trainer(job: TrainerJob, pipe: Connection | None) -> None:
    """Everything a trainer rank does; rank 0 has the pipe to the engine."""
    device = job.torch_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    if job.is_sharded:
        _join_trainers(job)
    source = zero3_source(job) if job.zero3 else TensorList(job)
    if job.transport == "nccl" and job.rank == 0:
        with RawGroup(0, job.raw_port, device) as group:
            group.measure(TensorList.num_bytes_of(job.tensors))
    push, close = _sharded(job, source, pipe) if job.is_sharded else _single(job, source, pipe)
    seconds = []
    memory = [0, 0]
    for index in range(job.updates + job.cycles):
        if index == job.updates:
            memory[0] = _used_bytes(device)
        started = time.perf_counter()
        push(index + 1)
        seconds.append(time.perf_counter() - started)
        if job.check and index == 0 and pipe is not None:
            check_stored(TensorList(job), PipeTarget(pipe))
        if pipe is not None and index < job.updates:
            time.sleep(0.05)
    memory[1] = _used_bytes(device)
    close()
    if pipe is not None:
        pipe.send(("done", {"push_s": seconds, "memory": memory}))


def _join_trainers(job: TrainerJob) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(job.port),
        RANK=str(job.rank),
        WORLD_SIZE=str(job.world_size),
        LOCAL_RANK=str(job.gpu),
        LOCAL_WORLD_SIZE=str(job.world_size),
    )
    dist.init_process_group("cpu:gloo,cuda:nccl" if job.device == "cuda" else "gloo")


def _single(job: TrainerJob, source: WeightSource, pipe: Connection | None) -> tuple[Any, Any]:
    assert pipe is not None
    options = PushOptions(
        transport=job.transport,  # type: ignore[arg-type]
        checksums=job.checksums,
        mode=job.mode,
    )
    publisher = Publisher(source, [PipeTarget(pipe)], options)
    return publisher.push, publisher.close


def _sharded(job: TrainerJob, source: WeightSource, pipe: Connection | None) -> tuple[Any, Any]:
    targets = [] if pipe is None else [PipeTarget(pipe)]
    way: Any = job.way or "auto"
    carrier = ShardedCarrier(targets, device=job.torch_device(), way=way)

    def push(version: int) -> None:
        dist.all_gather_object([None] * job.world_size, version)
        carrier.publish(
            BeginUpdate(version=version, manifest=source.specs(), mode=job.mode), source
        )

    return push, carrier.close


def _used_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
