"""Packing tensors into buckets: what a receiver that plans alike reads back."""

from __future__ import annotations

import pytest
import torch

from engine.protocol import TensorPiece, buckets, plan_buckets
from trainer_bridge.packing import BucketPacker

SHAPES = {"a": (3, 5), "b": (1,), "c": (7, 11), "d": (2, 2, 2), "e": (64,)}


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}


def read_back(plan, sent: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for bucket, data in zip(plan, sent, strict=True):
        assert data.numel() == bucket.num_bytes
        for placed in bucket.placements:
            raw = data[placed.offset : placed.offset + placed.num_bytes]
            dtype = getattr(torch, placed.piece.dtype)
            found[placed.piece.name] = raw.clone().view(dtype).view(placed.piece.shape)
    return found


@pytest.mark.parametrize("bucket_bytes", [1, 64, 200, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_receiver_reads_what_was_packed(bucket_bytes: int, dtype: torch.dtype) -> None:
    source = tensors(dtype)
    name = str(dtype).removeprefix("torch.")
    pieces = [TensorPiece(key, name, list(value.shape)) for key, value in source.items()]
    sent: list[torch.Tensor] = []
    packer = BucketPacker(torch.device("cpu"), bucket_bytes)
    flats = (value.reshape(-1) for value in source.values())
    packer.send(pieces, flats, lambda data: sent.append(data.clone()), lambda work: None)
    found = read_back(plan_buckets(pieces, bucket_bytes), sent)
    assert found.keys() == source.keys()
    for key, value in source.items():
        assert torch.equal(found[key], value)


def test_large_resident_tensors_are_sent_from_where_they_are(monkeypatch) -> None:
    monkeypatch.setattr(buckets, "ALONE_BYTES", 100)
    source = {**tensors(torch.float32), "f": torch.randn(30, 8).t(), "g": torch.randn(900)}
    pieces = [TensorPiece(key, "float32", list(value.shape)) for key, value in source.items()]
    flats = {
        key: value.flatten() if value.is_contiguous() else torch.randn(480)[::2]
        for key, value in source.items()
    }
    sent: list[torch.Tensor] = []
    addresses: list[int] = []

    def broadcast(data: torch.Tensor) -> int:
        sent.append(data.clone())
        addresses.append(data.data_ptr())
        return len(sent)

    waited: list[int] = []
    packer = BucketPacker(torch.device("cpu"), 1 << 20)
    packer.send(pieces, iter(flats.values()), broadcast, waited.append, resident=True)
    plan = plan_buckets(pieces, 1 << 20)
    assert [[p.piece.name for p in bucket.placements] for bucket in plan] == [
        ["a", "b"],
        ["c"],
        ["d"],
        ["e"],
        ["f"],
        ["g"],
    ]
    assert sorted(waited) == list(range(1, len(sent) + 1))
    for name in ("c", "e", "g"):
        assert flats[name].data_ptr() in addresses
    found = read_back(plan, sent)
    for key, flat in flats.items():
        assert torch.equal(found[key].reshape(-1), flat), key


def test_a_buffer_is_not_overwritten_before_its_broadcast_is_done() -> None:
    pieces = [TensorPiece(str(i), "float32", [4]) for i in range(5)]
    in_flight: dict[int, torch.Tensor] = {}
    seen = []

    def broadcast(data: torch.Tensor) -> int:
        assert all(data.data_ptr() != other.data_ptr() for other in in_flight.values())
        in_flight[len(seen)] = data
        seen.append(data)
        return len(seen) - 1

    packer = BucketPacker(torch.device("cpu"), 16)
    flats = (torch.full((4,), float(i)) for i in range(5))
    packer.send(pieces, flats, broadcast, lambda work: in_flight.pop(work))
    assert len(seen) == 5 and not in_flight


def test_buffers_are_retained_from_update_to_update() -> None:
    pieces = [TensorPiece("w", "float32", [256])]
    packer = BucketPacker(torch.device("cpu"), 512)
    seen = []
    for _ in range(3):
        packer.send(
            pieces,
            iter([torch.zeros(256)]),
            lambda data: seen.append(data.data_ptr()),
            lambda work: None,
        )
    assert len(set(seen)) == 1
