"""Tensors out of another process's memory: shared memory here, CUDA IPC where there is a GPU."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest
import torch

from engine.errors import InvalidRequest, ManifestMismatch, UnsupportedOption, WeightUpdateError
from engine.protocol import (
    BeginUpdate,
    CommitUpdate,
    IpcBuffer,
    IpcPayload,
    IpcTensor,
    ReceiveIpc,
    encode,
)
from engine.weights import ipc as ipc_module
from engine.weights.mapping import MappedBuffers
from engine.weights.unpickle import FlattenedTensorMetadata, LocalSerializedTensor
from tests.helpers.weight_engines import (
    assert_holds,
    contents,
    fresh,
    make_rank,
    pieces,
    specs,
)

ROOT = Path(__file__).resolve().parents[3]
NORM = "model.norm.weight"


@contextmanager
def shared(
    tensors: dict[str, torch.Tensor], start: int = 0
) -> Iterator[tuple[IpcPayload, memoryview]]:
    """The tensors one behind the other in a block of shared memory, from byte `start`."""
    total = start + sum(t.numel() * t.element_size() for t in tensors.values())
    block = SharedMemory(create=True, size=total)
    entries, offset = [], start
    for piece, tensor in zip(pieces(tensors), tensors.values(), strict=True):
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        block.buf[offset : offset + len(data)] = data
        entries.append(IpcTensor(piece.name, piece.dtype, piece.shape, 0, offset))
        offset += len(data)
    try:
        yield IpcPayload([IpcBuffer("shm", total, name=block.name)], entries), block.buf
    finally:
        block.close()
        block.unlink()


def test_a_receive_that_is_cancelled_ends_at_the_next_tensor() -> None:
    model, rank = make_rank()
    old, looks = contents(model), 0

    def look() -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            raise WeightUpdateError("the update was aborted", field="cancelled")

    rank.handle(BeginUpdate(version=4))
    with shared(fresh(model)) as (payload, _):
        receive = ReceiveIpc(format="native", payloads=[encode(payload)])
        with pytest.raises(WeightUpdateError, match="aborted"):
            rank.handle(receive, look)
        assert looks == 3
        assert_holds(model, old)
        rank.handle(BeginUpdate(version=4))
        rank.handle(receive)
        rank.handle(CommitUpdate(version=4))
        rank.close()


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
@pytest.mark.parametrize("borrow", [True, False])
def test_a_payload_is_placed(borrow: bool, mode: str, start: int) -> None:
    model, rank = make_rank()
    for version in (4, 5):
        new = fresh(model, seed=version)
        with shared(new, start) as (payload, _):
            rank.handle(BeginUpdate(version=version, manifest=specs(new), mode=mode))
            rank.handle(ReceiveIpc(payloads=[encode(payload)], borrow=borrow))
            rank.handle(CommitUpdate(version=version))
        assert_holds(model, new)
    rank.close()


def test_shared_memory_of_the_host_is_copied_before_the_reply_lent_or_not() -> None:
    model, rank = make_rank()
    before, new = contents(model), fresh(model)
    for version, borrow in ((4, False), (5, True)):
        with shared(new) as (payload, memory):
            rank.handle(BeginUpdate(version=version, mode="shadow"))
            rank.handle(ReceiveIpc(payloads=[encode(payload)], borrow=borrow))
            if version == 4:
                assert_holds(model, before)
            memory[:] = bytes(len(memory))
            rank.handle(CommitUpdate(version=version))
        assert_holds(model, new)
    rank.close()


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("borrow", [True, False])
def test_one_payload_with_new_contents_brings_them(borrow: bool, start: int) -> None:
    model, rank = make_rank()
    with shared(fresh(model), start) as (payload, memory):
        for version in (4, 5, 6):
            new = fresh(model, seed=version)
            flat = torch.cat([t.reshape(-1) for t in new.values()]).view(torch.uint8)
            memory[start:] = flat.numpy().tobytes()
            rank.handle(BeginUpdate(version=version, manifest=specs(new)))
            rank.handle(ReceiveIpc(payloads=[encode(payload)], borrow=borrow))
            rank.handle(CommitUpdate(version=version))
            assert_holds(model, new)
    rank.close()


def test_a_buffer_is_mapped_once_and_let_go_two_updates_later(monkeypatch) -> None:
    opened: list[str] = []

    def map_one(_self: object, buffer: IpcBuffer) -> torch.Tensor:
        opened.append(buffer.name)
        return torch.empty(buffer.size, dtype=torch.uint8)

    monkeypatch.setattr(MappedBuffers, "_map", map_one)
    held = MappedBuffers(torch.device("cpu"))
    first, second = (IpcBuffer("cuda", 8, name=name) for name in ("first", "second"))
    mapped = held.open([first], 4)[0]
    assert held.open([first], 5)[0] is mapped
    held.open([second], 6)
    assert len(held) == 2
    held.open([second], 7)
    assert len(held) == 1
    assert opened == ["first", "second"]
    held.close()
    assert len(held) == 0


def test_a_block_that_is_cut_short_is_refused_and_ends_nobody() -> None:
    model, rank = make_rank()
    new = fresh(model)
    with shared(new) as (payload, _):
        path = Path("/dev/shm") / payload.buffers[0].name
        rank.handle(BeginUpdate(version=4))
        rank.handle(ReceiveIpc(payloads=[encode(payload)], borrow=True))
        os.truncate(path, 16)
        rank.handle(CommitUpdate(version=4))
        assert_holds(model, new)
        rank.handle(BeginUpdate(version=5))
        with pytest.raises(WeightUpdateError, match="it has 16 bytes"):
            rank.handle(ReceiveIpc(payloads=[encode(payload)], borrow=True))
        os.truncate(path, payload.buffers[0].size)
    assert_holds(model, new)


@pytest.mark.parametrize("mode", ["shadow", "in_place"])
@pytest.mark.parametrize("borrow", [True, False])
def test_integers_are_refused_before_anything_is_torn(mode: str, borrow: bool, monkeypatch) -> None:
    model, rank = make_rank()
    before, new = contents(model), fresh(model)
    name = next(iter(new))
    integers = {n: t.to(torch.int64) if n == name else t for n, t in new.items()}
    monkeypatch.setattr(ipc_module, "restricted_loads", lambda _data: list(integers.items()))
    rank.handle(BeginUpdate(version=4, mode=mode))
    with pytest.raises(ManifestMismatch, match="int64") as refused:
        rank.handle(ReceiveIpc(payloads=[b""], format="sglang", borrow=borrow))
    assert refused.value.field == name
    rank.session.require_servable()
    assert_holds(model, before)


def test_each_rank_reads_its_own_payload() -> None:
    new, other = fresh(make_rank()[0]), fresh(make_rank()[0], seed=9)
    with shared(new) as (mine, _), shared(other) as (yours, _):
        payloads = [encode(yours), encode(mine)]
        model, rank = make_rank(1, 2)
        rank.handle(BeginUpdate(version=4))
        rank.handle(ReceiveIpc(payloads=payloads))
        rank.handle(CommitUpdate(version=4))
        assert_holds(model, new)
        rank.handle(BeginUpdate(version=5))
        with pytest.raises(InvalidRequest, match="3 payloads for 2 rank"):
            rank.handle(ReceiveIpc(payloads=[*payloads, b""]))
        rank.close()


def spoiled(payload: IpcPayload, how: str) -> bytes:
    buffer, first = payload.buffers[0], payload.tensors[0]
    entry = {
        "name": first.name,
        "dtype": first.dtype,
        "shape": first.shape,
        "buffer": 0,
        "offset": 0,
    }
    if how == "bytes":
        return b"nothing"
    if how == "gone":
        return encode(IpcPayload([IpcBuffer("shm", 8, name="slipstream-not-there")], []))
    if how == "path":
        return encode(IpcPayload([IpcBuffer("shm", 8, name="../../etc/passwd")], []))
    if how == "larger":
        bigger = IpcBuffer("shm", buffer.size + (1 << 20), name=buffer.name)
        return encode(IpcPayload([bigger], payload.tensors))
    if how == "cuda":
        return encode(IpcPayload([IpcBuffer("cuda", 8)], []))
    changes = {
        "beyond": {"offset": buffer.size - 4},
        "negative": {"offset": -4},
        "buffer": {"buffer": 1},
        "dtype": {"dtype": "int32"},
        "shape": {"shape": [4, 4]},
        "unknown": {"name": "model.nothing"},
    }
    return encode(IpcPayload([buffer], [IpcTensor(**{**entry, **changes[how]})]))


ERRORS = {
    "bytes": (InvalidRequest, "no IPC payload"),
    "gone": (WeightUpdateError, "cannot be read"),
    "path": (InvalidRequest, "names no shared memory"),
    "larger": (WeightUpdateError, "cannot be read"),
    "cuda": (InvalidRequest, "runs on the CPU"),
    "beyond": (ManifestMismatch, "beyond its buffer"),
    "negative": (InvalidRequest, "offset"),
    "buffer": (ManifestMismatch, "buffer 1 of 1"),
    "dtype": (ManifestMismatch, "int32"),
    "shape": (ManifestMismatch, "shape"),
    "unknown": (ManifestMismatch, "no tensor of this model"),
}


@pytest.mark.parametrize("how", ERRORS)
def test_a_payload_that_cannot_be_read_is_refused_before_anything_moves(how: str) -> None:
    model, rank = make_rank()
    new = fresh(model)
    kind, message = ERRORS[how]
    with shared(new) as (payload, _):
        rank.handle(BeginUpdate(version=4, mode="in_place"))
        with pytest.raises(kind, match=message):
            rank.handle(ReceiveIpc(payloads=[spoiled(payload, how)]))
        rank.session.require_servable()
        rank.handle(ReceiveIpc(payloads=[encode(payload)]))
        rank.handle(CommitUpdate(version=4))
        assert_holds(model, new)
    rank.close()
    gc.collect()


def bucket(tensors: dict[str, torch.Tensor]) -> dict:
    flat = torch.cat([t.reshape(-1).view(torch.uint8) for t in tensors.values()])
    entries, start = [], 0
    for name, tensor in tensors.items():
        stop = start + tensor.numel() * tensor.element_size()
        entries.append(
            FlattenedTensorMetadata(name, tensor.shape, tensor.dtype, start, stop, tensor.numel())
        )
        start = stop
    return {"flattened_tensor": flat, "metadata": entries}


def bucket_of_values(tensors: dict[str, torch.Tensor]) -> dict:
    """As trainers flattened before they flattened bytes: one `torch.cat`, which promotes."""
    flat = torch.cat([t.reshape(-1) for t in tensors.values()])
    entries, start = [], 0
    for name, tensor in tensors.items():
        stop = start + tensor.numel()
        entries.append(
            FlattenedTensorMetadata(name, tensor.shape, tensor.dtype, start, stop, tensor.numel())
        )
        start = stop
    return {"flattened_tensor": flat, "metadata": entries}


def receive_bucket(rank, value: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipc_module, "restricted_loads", lambda data: value)
    rank.handle(ReceiveIpc(payloads=[b""], format="sglang_bucket"))


@pytest.mark.parametrize("mixed", [False, True])
def test_a_bucket_of_promoted_values_is_placed(mixed: bool, monkeypatch) -> None:
    model, rank = make_rank()
    new = {name: t.bfloat16() for name, t in fresh(model).items()}
    if mixed:
        new[NORM] = fresh(model)[NORM]
    value = bucket_of_values(new)
    assert value["flattened_tensor"].dtype == (torch.float32 if mixed else torch.bfloat16)
    rank.handle(BeginUpdate(version=4))
    receive_bucket(rank, value, monkeypatch)
    rank.handle(CommitUpdate(version=4))
    assert_holds(model, {name: t.float() for name, t in new.items()})
    rank.close()


@pytest.mark.parametrize("how", ["short", "long", "rounded", "beyond", "backwards"])
def test_a_slice_that_is_not_its_tensor_is_refused_by_name(how: str, monkeypatch) -> None:
    model, rank = make_rank()
    before, new = contents(model), fresh(model)
    if how == "rounded":
        value = bucket_of_values({**new, NORM: torch.arange(new[NORM].numel(), dtype=torch.int32)})
    else:
        value = bucket(new)
    entry = next(each for each in value["metadata"] if each.name == NORM)
    match how:
        case "short":
            entry.end_idx -= 4
        case "long":
            entry.start_idx -= 4
        case "beyond":
            entry.start_idx += value["flattened_tensor"].numel()
            entry.end_idx += value["flattened_tensor"].numel()
        case "backwards":
            entry.start_idx, entry.end_idx = entry.end_idx, entry.start_idx
    rank.handle(BeginUpdate(version=4, mode="in_place"))
    with pytest.raises(ManifestMismatch, match=NORM) as caught:
        receive_bucket(rank, value, monkeypatch)
    assert caught.value.field == NORM
    rank.session.require_servable()
    assert_holds(model, before)
    rank.close()


@pytest.mark.parametrize("kind", ["sglang", "sglang_bucket", "per_rank"])
def test_what_sglang_trainers_pickle_is_placed(kind: str, monkeypatch) -> None:
    """The objects that the allow-list unpickler returns; its own tests cover the bytes."""
    model, rank = make_rank(1, 2)
    new = fresh(make_rank()[0])
    halves = {name: [pickle.dumps(0), pickle.dumps(name)] for name in new}
    objects = {
        b"sglang": list(new.items()),
        b"sglang_bucket": bucket(new),
        b"per_rank": [(name, LocalSerializedTensor(values)) for name, values in halves.items()],
        **{values[1]: new[name] for name, values in halves.items()},
    }
    monkeypatch.setattr(ipc_module, "restricted_loads", lambda data: objects[bytes(data)])
    rank.handle(BeginUpdate(version=4))
    form = "sglang" if kind == "per_rank" else kind
    rank.handle(ReceiveIpc(payloads=[b"", kind.encode()], format=form))
    rank.handle(CommitUpdate(version=4))
    assert_holds(model, new)
    rank.close()


@pytest.mark.parametrize(
    "form,value", [("sglang", 3), ("sglang_bucket", [1]), ("sglang", [("a", 3)])]
)
def test_pickles_of_something_else_are_refused(form: str, value: object) -> None:
    _, rank = make_rank()
    rank.handle(BeginUpdate(version=4))
    with pytest.raises(InvalidRequest):
        rank.handle(ReceiveIpc(payloads=[pickle.dumps(value)], format=form))
    rank.close()


def test_vllm_ipc_is_known_and_not_served() -> None:
    _, rank = make_rank()
    rank.handle(BeginUpdate(version=4))
    with pytest.raises(UnsupportedOption, match="NCCL"):
        rank.handle(ReceiveIpc(payloads=[b""], format="vllm"))
    assert rank.session.open_version == 4


CUDA_SENDER = """
import sys
import torch
from engine.protocol import IpcPayload, IpcTensor, encode
from trainer_bridge.transports.cuda_ipc import _export_cuda

device = torch.device("cuda", 0)
first = torch.arange(5000, device=device, dtype=torch.float32)
pool = torch.arange(7000, dtype=torch.bfloat16).to(device)
tensors = [("first", first), ("second", pool[100:6100].view(60, 100))]
buffers = [_export_cuda(t.untyped_storage(), device) for _, t in tensors]
entries = [
    IpcTensor(n, str(t.dtype).removeprefix("torch."), list(t.shape), i,
              t.data_ptr() - t.untyped_storage().data_ptr())
    for i, (n, t) in enumerate(tensors)
]
torch.cuda.synchronize()
print(encode(IpcPayload(buffers, entries)).hex(), flush=True)
sys.stdin.readline()
first.fill_(7)
torch.cuda.synchronize()
print("changed", flush=True)
sys.stdin.readline()
"""


@pytest.mark.gpu
def test_memory_of_another_process_on_the_gpu_is_mapped() -> None:
    from engine.protocol import decode
    from engine.weights.mapping import MappedBuffers

    process = subprocess.Popen(
        [sys.executable, "-c", CUDA_SENDER],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        payload = decode(bytes.fromhex(process.stdout.readline()), IpcPayload)
        buffers = MappedBuffers(torch.device("cuda", 0))
        mapped = buffers.open(payload.buffers, 4)
        first, second = (ipc_module._view(tensor, mapped) for tensor in payload.tensors)
        assert torch.equal(first.cpu(), torch.arange(5000.0))
        want = torch.arange(7000, dtype=torch.bfloat16)[100:6100].view(60, 100)
        assert torch.equal(second.cpu(), want)
        print(file=process.stdin, flush=True)
        assert process.stdout.readline() == "changed\n"
        torch.cuda.synchronize()
        assert bool((first == 7).all()), "the very memory, not a copy"
        del mapped, first, second
        buffers.close()
        wrong = payload.buffers[0].__class__(
            **{
                field: getattr(payload.buffers[0], field)
                for field in payload.buffers[0].__struct_fields__
            }
            | {"device": "00000000-0000-0000-0000-000000000000"}
        )
        with pytest.raises(InvalidRequest, match="CUDA IPC is for one GPU"):
            buffers.open([wrong], 5)
        print(file=process.stdin, flush=True)
        process.wait(120)
    finally:
        process.kill()
        process.wait(60)
        process.stdin.close()
        process.stdout.close()
