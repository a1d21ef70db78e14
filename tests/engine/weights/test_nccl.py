"""Groups over NCCL: what can be seen without a GPU, and with two of them every way to pair."""

from __future__ import annotations

import ctypes
import pickle
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from engine.comm import nccl
from engine.errors import GroupError, UpdateTimeout, WeightUpdateError
from engine.layers.runtime import LayerRuntime
from engine.models.build import build_model
from engine.models.config import read_config
from engine.parallel.mesh import Mesh
from engine.protocol import (
    BeginUpdate,
    CommitUpdate,
    JoinGroup,
    LeaveGroup,
    ReceiveBroadcast,
    plan_buckets,
)
from engine.protocol.deadlines import MAX_TIMEOUT_S, MEET_S, SILENT_S
from engine.weights import vllm_group
from engine.weights.initial import load_initial
from engine.weights.service import WeightService
from engine.weights.sources import random
from tests.helpers.weight_engines import CONFIG, VERSION, contents, fresh, pieces, specs

ROOT = Path(__file__).resolve().parents[3]
BUCKET_BYTES = 4000


def test_without_a_library_the_error_says_what_was_tried(monkeypatch) -> None:
    nccl.library.cache_clear()

    def absent(path: str) -> None:
        raise OSError(f"{path}: not there")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    with pytest.raises(nccl.NcclError, match=r"libnccl\.so\.2: not there"):
        nccl.library()
    nccl.library.cache_clear()


def test_an_id_of_another_length_is_refused() -> None:
    with pytest.raises(nccl.NcclError, match="128 bytes, not 5"):
        nccl.Communicator(b"short", rank=0, world_size=2, deadline=0.0)


def vllm_pickle(unique_id: bytes) -> bytes:
    """The id as vLLM's trainers put it into the store: a pickle of their ctypes class."""
    path = "vllm.distributed.device_communicators.pynccl_wrapper"
    parts = path.split(".")
    names = [".".join(parts[: count + 1]) for count in range(len(parts))]

    class ncclUniqueId(ctypes.Structure):
        _fields_ = [("internal", ctypes.c_byte * 128)]

    ncclUniqueId.__module__, ncclUniqueId.__qualname__ = path, "ncclUniqueId"
    with mock.patch.dict(sys.modules, {name: types.ModuleType(name) for name in names}):
        sys.modules[path].ncclUniqueId = ncclUniqueId
        return pickle.dumps(ncclUniqueId.from_buffer_copy(unique_id))


class Recorded:
    """In place of a NCCL group: what it would have been built from."""

    made: Any = None

    def __init__(self, command, rank, device, unique_id, store, look, helpers) -> None:
        self.rank, self.unique_id, self.warm = rank, unique_id(0.0), False
        Recorded.made = self

    def warm_up(self, deadline: float) -> None:
        self.warm = True


@pytest.mark.parametrize("given", [True, False])
def test_a_vllm_trainer_s_id_is_found(given: bool, monkeypatch) -> None:
    monkeypatch.setattr(vllm_group, "NcclGroup", Recorded)
    unique_id = bytes(range(128))
    store = torch.distributed.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=False
    )
    store.set("broadcast_from/0/0", vllm_pickle(unique_id))
    command = JoinGroup(
        name="g",
        address="127.0.0.1",
        port=store.port,
        rank_offset=1,
        world_size=2,
        rendezvous="vllm",
        unique_id=unique_id if given else b"",
    )
    vllm_group.join(command, 1, torch.device("cpu"), time.monotonic() + MEET_S)
    assert (Recorded.made.rank, Recorded.made.unique_id) == (1, unique_id)
    assert Recorded.made.warm


def test_a_vllm_trainer_that_publishes_no_id_or_another_thing(monkeypatch) -> None:
    monkeypatch.setattr(vllm_group, "NcclGroup", Recorded)
    store = torch.distributed.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=False
    )
    command = JoinGroup(
        name="g",
        address="127.0.0.1",
        port=store.port,
        rank_offset=1,
        world_size=2,
        rendezvous="vllm",
    )
    with pytest.raises(GroupError, match=r"rank 0 \(trainer\).* did not publish a NCCL id"):
        vllm_group.join(command, 1, torch.device("cpu"), time.monotonic() + 1.0)
    store.set("broadcast_from/0/0", pickle.dumps([1, 2]))
    with pytest.raises(GroupError, match="holds no NCCL id"):
        vllm_group.join(command, 1, torch.device("cpu"), time.monotonic() + MEET_S)


# --- two GPUs: the trainer on the first, the engine on the second ------------------------


def make_gpu_rank() -> tuple[Any, WeightService]:
    device = torch.device("cuda", 1)
    runtime = LayerRuntime(device=device, dtype=torch.float32, backend="triton")
    model = build_model(read_config(CONFIG), runtime=runtime)
    rank = WeightService(
        model,
        version=VERSION,
        device=device,
        mesh=Mesh(),
        agree=lambda value: value,
        require_weights=lambda: None,
    )
    load_initial(rank.session.catalog, random.tensors(model.weight_index(), seed=0))
    return model, rank


@contextmanager
def sending(
    rank: WeightService, folder: Path, buffers: list[list[torch.Tensor]], then: str, kind: str
) -> Iterator[subprocess.Popen[str]]:
    """A sender of these broadcasts in a process of its own, joined by `rank`."""
    folder.mkdir()
    log = folder.with_suffix(".err").open("w")
    for index, update in enumerate(buffers):
        torch.save(update, folder / f"{index}.pt")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.nccl_sender", kind, str(folder), then],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    log.close()
    try:
        assert process.stdout is not None
        rank.handle(join_of(int(process.stdout.readline())))
        yield process
    finally:
        process.kill()
        process.wait(SILENT_S)
        process.stdout.close()


def join_of(port: int) -> JoinGroup:
    return JoinGroup(
        name="g", address="127.0.0.1", port=port, rank_offset=1, world_size=2, timeout_s=MEET_S
    )


def packed(new: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    buckets = []
    for bucket in plan_buckets(pieces(new), BUCKET_BYTES):
        buffer = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
        for placed in bucket.placements:
            flat = new[placed.piece.name].reshape(-1).view(torch.uint8)
            buffer[placed.offset : placed.offset + placed.num_bytes] = flat.cpu()
        buckets.append(buffer)
    return buckets


def receive(new: dict[str, torch.Tensor], timeout_s: float = MEET_S) -> ReceiveBroadcast:
    return ReceiveBroadcast(
        group="g", tensors=pieces(new), bucket_bytes=BUCKET_BYTES, timeout_s=timeout_s
    )


def take_in(rank: WeightService, new: dict[str, torch.Tensor], version: int, mode: str) -> None:
    rank.handle(BeginUpdate(version=version, manifest=specs(new), mode=mode))
    with torch.cuda.device(1):
        rank.handle(receive(new))
    rank.handle(CommitUpdate(version=version))


def assert_gpu_holds(model, tensors: dict[str, torch.Tensor]) -> None:
    for name, held in contents(model).items():
        assert torch.equal(held.cpu(), tensors[name].cpu()), name


@pytest.mark.multi_gpu
@pytest.mark.parametrize("kind", ["ours", "torch"])
@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
def test_updates_come_in_from_either_sender(mode: str, kind: str, tmp_path: Path) -> None:
    model, rank = make_gpu_rank()
    updates = {version: fresh(model, seed=version) for version in (4, 5, 6, 7)}
    first = [packed(updates[version]) for version in (4, 5, 6)]
    with sending(rank, tmp_path / "first", first, "stall", kind):
        for version in (4, 5, 6):
            take_in(rank, updates[version], version, mode)
            assert_gpu_holds(model, updates[version])
        rank.handle(LeaveGroup(name="g"))
    with sending(rank, tmp_path / "second", [packed(updates[7])], "close", kind):
        take_in(rank, updates[7], 7, mode)
        assert_gpu_holds(model, updates[7])
    rank.close()


@pytest.mark.multi_gpu
@pytest.mark.parametrize("sent", [0, 2])
@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
def test_a_sender_that_stalls_is_given_up_and_the_next_update_works(
    mode: str, sent: int, tmp_path: Path
) -> None:
    model, rank = make_gpu_rank()
    before, new = contents(model), fresh(model)
    with sending(rank, tmp_path / "stalls", [packed(new)[:sent]], "stall", "ours"):
        rank.handle(BeginUpdate(version=4, manifest=specs(new), mode=mode))
        with pytest.raises((UpdateTimeout, GroupError), match="rank 0"), torch.cuda.device(1):
            rank.handle(receive(new, timeout_s=4.0))
    if mode != "in_place":
        assert_gpu_holds(model, before)
    else:
        with pytest.raises(WeightUpdateError):
            rank.session.require_servable()
    with sending(rank, tmp_path / "works", [packed(new)], "close", "ours"):
        take_in(rank, new, 5, mode)
    assert_gpu_holds(model, new)
    rank.session.require_servable()
    rank.close()


@pytest.mark.multi_gpu
@pytest.mark.parametrize("count", [0, 3])
def test_a_killed_process_is_noticed_long_before_the_deadline(count: int, tmp_path: Path) -> None:
    model, rank = make_gpu_rank()
    before, new = contents(model), fresh(model)
    with sending(rank, tmp_path / "dies", [packed(new)[:count]], "die", "ours"):
        rank.handle(BeginUpdate(version=4, manifest=specs(new), mode="shadow"))
        # No test may take as long as that: only its absence can end the wait.
        with pytest.raises(GroupError, match="rank 0"), torch.cuda.device(1):
            rank.handle(receive(new, timeout_s=MAX_TIMEOUT_S))
    assert_gpu_holds(model, before)
    with sending(rank, tmp_path / "works", [packed(new)], "close", "ours"):
        take_in(rank, new, 4, "shadow")
    assert_gpu_holds(model, new)
    rank.close()


@pytest.mark.multi_gpu
def test_a_trainer_outlives_an_engine_that_left(tmp_path: Path) -> None:
    model, rank = make_gpu_rank()
    new = fresh(model)
    with sending(rank, tmp_path / "late", [packed(new)], "late", "ours") as process:
        take_in(rank, new, 4, "shadow")
        assert process.stdout is not None
        assert process.stdout.readline() == "sent\n"
        rank.handle(LeaveGroup(name="g"))
        line = process.stdout.readline()
        said = line or (tmp_path / "late.err").read_text()
        assert said.startswith(("UpdateTimeout: ", "GroupError: a member of group")), said
        assert process.wait(MEET_S) == 0
    rank.close()


@pytest.mark.multi_gpu
def test_a_raw_communicator_as_vllm_s_trainers_make_it() -> None:
    model, rank = make_gpu_rank()
    new = fresh(model)
    store = torch.distributed.TCPStore(
        "127.0.0.1",
        0,
        is_master=True,
        wait_for_workers=False,
        use_libuv=False,
        timeout=timedelta(seconds=MEET_S),
    )
    device, deadline = torch.device("cuda", 0), time.monotonic() + MEET_S
    stream = torch.cuda.Stream(device)
    flat = torch.cat([t.reshape(-1).view(torch.uint8) for t in new.values()]).to(device)
    torch.cuda.synchronize(device)

    def trainer() -> None:
        unique_id = nccl.new_unique_id()
        store.set("broadcast_from/0/0", vllm_pickle(unique_id))
        handle = stream.cuda_stream
        with torch.cuda.device(device), torch.cuda.stream(stream):
            comm = nccl.Communicator(unique_id, rank=0, world_size=2, deadline=deadline)
            zero = torch.zeros(1, device=device)
            comm.sum_one(zero.data_ptr(), stream=handle, deadline=deadline)
            stream.synchronize()
            comm.broadcast(flat.data_ptr(), flat.nbytes, root=0, stream=handle, deadline=deadline)
            stream.synchronize()
        comm.abort()

    with ThreadPoolExecutor(1) as pool, torch.cuda.device(1):
        sent = pool.submit(trainer)
        command = JoinGroup(
            name="w",
            address="127.0.0.1",
            port=store.port,
            rank_offset=1,
            world_size=2,
            rendezvous="vllm",
            timeout_s=MEET_S,
        )
        rank.handle(command)
        rank.handle(BeginUpdate(version=4))
        rank.handle(
            ReceiveBroadcast(group="w", tensors=pieces(new), layout="chunks", bucket_bytes=1 << 30)
        )
        rank.handle(CommitUpdate(version=4))
        sent.result(MEET_S)
    assert_gpu_holds(model, new)
    rank.close()
