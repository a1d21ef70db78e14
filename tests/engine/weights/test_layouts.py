"""How the four layouts cut tensors into broadcasts."""

from __future__ import annotations

import pytest
import torch

from engine.errors import ManifestMismatch
from engine.protocol import Placement, ReceiveBroadcast, TensorPiece
from engine.weights.layouts import broadcasts, elements

PIECES = [
    TensorPiece("a", "bfloat16", [3]),
    TensorPiece("b", "float32", [2, 2]),
    TensorPiece("c", "bfloat16", [10], 4, 9),
    TensorPiece("d", "float32", [0]),
]


def cut(layout: str, bucket_bytes: int = 1 << 20) -> list[list[tuple[str, int, int]]]:
    command = ReceiveBroadcast(group="g", tensors=PIECES, layout=layout, bucket_bytes=bucket_bytes)
    return [
        [(placed.piece.name, placed.offset, placed.num_bytes) for placed in bucket.placements]
        for bucket in broadcasts(command)
    ]


def test_tensors_come_one_by_one() -> None:
    assert cut("tensors") == [[("a", 0, 6)], [("b", 0, 16)], [("c", 0, 10)], [("d", 0, 0)]]


def test_flat_has_no_padding() -> None:
    assert cut("flat") == [[("a", 0, 6), ("b", 6, 16), ("c", 22, 10), ("d", 32, 0)]]


def test_buckets_are_aligned_and_bounded() -> None:
    assert cut("buckets") == [[("a", 0, 6), ("b", 16, 16), ("c", 32, 10), ("d", 48, 0)]]
    assert cut("buckets", 32) == [[("a", 0, 6), ("b", 16, 16)], [("c", 0, 10), ("d", 16, 0)]]


@pytest.mark.parametrize("limit,ends", [(5, ["a", "b", "c"]), (6, ["b", "c"]), (22, ["c"])])
def test_a_chunk_keeps_the_tensor_that_exceeds_it(limit: int, ends: list[str]) -> None:
    chunks = cut("chunks", limit)
    assert [chunk[-1][0] for chunk in chunks][: len(ends)] == ends
    assert [name for chunk in chunks for name, _, _ in chunk] == ["a", "b", "c", "d"]
    assert all(chunk[0][1] == 0 for chunk in chunks)


@pytest.mark.parametrize("layout", ["tensors", "flat", "buckets", "chunks"])
def test_nothing_to_send_is_no_broadcast(layout: str) -> None:
    assert broadcasts(ReceiveBroadcast(group="g", tensors=[], layout=layout)) == []


@pytest.mark.parametrize("dtype", ["int32", "bool", "Tensor", "nonsense"])
def test_a_dtype_that_is_no_float_is_named(dtype: str) -> None:
    pieces = [TensorPiece("a", dtype, [3])]
    with pytest.raises(ManifestMismatch, match=f"a has dtype '{dtype}'") as refusal:
        broadcasts(ReceiveBroadcast(group="g", tensors=pieces))
    assert refusal.value.field == "a"


@pytest.mark.parametrize("offset", [0, 2, 4, 6])
def test_elements_are_read_at_any_offset(offset: int) -> None:
    want = torch.randn(5)
    buffer = torch.zeros(40, dtype=torch.uint8)
    buffer[offset : offset + 20] = want.view(torch.uint8)
    got = elements(buffer, Placement(TensorPiece("a", "float32", [5]), offset, 20))
    assert torch.equal(got, want)
    shares = got.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    assert shares == (offset % 4 == 0)
