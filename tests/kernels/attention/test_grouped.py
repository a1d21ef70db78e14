"""Grouped decode: rows that share pages, against the same rows computed one by one.

Unused page columns hold ids far out of range, unused KV is NaN, and the states that the tiles
leave are poisoned before: reading what nobody wrote shows.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from kernels.attention import SharedTiles, paged_attention
from kernels.attention.tiles import TILE_ROWS
from kernels.testing import assert_close, poison, poisoned_allocations, triton_device

PAGE = 16


class Group(NamedTuple):
    """`rows` rows share their first `shared` tokens; row i then has own[i % len(own)] more.
    `tiled`: they have tiles."""

    rows: int
    shared: int
    own: tuple[int, ...]
    tiled: bool = True


class Batch(NamedTuple):
    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    table: torch.Tensor
    query_start: torch.Tensor
    kv_len: torch.Tensor
    tiles: SharedTiles

    def run(self, shared: bool, backend: str = "triton") -> torch.Tensor:
        tensors = self[:6]
        with poisoned_allocations():
            return paged_attention(
                *tensors,
                scale=self.q.shape[-1] ** -0.5,
                max_query_len=1,
                shared=self.tiles if shared else None,
                backend=backend,
            )


def make(
    groups: list[Group],
    heads: tuple[int, int] = (6, 2),
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
) -> Batch:
    lengths = [g.shared + g.own[i % len(g.own)] for g in groups for i in range(g.rows)]
    columns = [-(-length // PAGE) for length in lengths]
    free = iter(torch.randperm(sum(columns) + 2).tolist())
    table = torch.full((len(lengths), max(columns) + 1), 10**6, dtype=torch.int32)
    shape = (sum(columns) + 2, PAGE, heads[1], head_dim)
    k_pages, v_pages = poison(torch.empty(shape)), poison(torch.empty(shape))
    row = 0
    for group in groups:
        front = group.shared // PAGE
        pages = [next(free) for _ in range(front)]
        for _ in range(group.rows):
            own = [next(free) for _ in range(columns[row] - front)]
            ids = torch.tensor(pages + own, dtype=torch.int32)
            table[row, : len(ids)] = ids
            for column, page in enumerate(ids.tolist()):
                filled = min(lengths[row] - column * PAGE, PAGE)
                k_pages[page, :filled], v_pages[page, :filled] = torch.randn(2, filled, *shape[2:])
            row += 1
    device = device or triton_device()
    floats = [torch.randn(row, heads[0], head_dim), k_pages, v_pages]
    ints = [table, torch.arange(row + 1), torch.tensor(lengths)]
    return Batch(
        *(x.to(device, dtype) for x in floats),
        *(x.to(device, torch.int32) for x in ints),
        tiles_of(groups, device),
    )


def tiles_of(groups: list[Group], device: str) -> SharedTiles:
    triples, tokens, start = [], [], 0
    for rows, shared, _, tiled in groups:
        tokens += [shared * tiled] * rows
        if tiled:
            cuts = range(start, start + rows, TILE_ROWS)
            triples += [(cut, min(TILE_ROWS, start + rows - cut), shared) for cut in cuts]
        start += rows
    triples += [(0, 0, 0)] * 3
    return SharedTiles(
        torch.tensor(triples, dtype=torch.int32, device=device),
        torch.tensor(tokens, dtype=torch.int32, device=device),
    )


MIXED = [
    Group(3, 128, (5, 130, 16)),
    Group(1, 0, (33,), tiled=False),
    Group(2, 256, (1,)),
    Group(2, 128, (7,), tiled=False),
]
MANY_ROWS = [Group(TILE_ROWS + 3, 128, (3, 20))]


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [MIXED, MANY_ROWS])
def test_tiles_match_the_reference(groups: list[Group]) -> None:
    batch = make(groups)
    assert_close("grouped", batch.run(shared=True), batch.run(False, "torch"), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "head_dim"), [((2, 2), 20), ((18, 2), 16), ((20, 1), 16)])
def test_any_number_of_heads(heads: tuple[int, int], head_dim: int) -> None:
    """18 / 2: a tile's heads are more than a program takes; 20 / 1: more than a power of two."""
    batch = make([Group(3, 128, (5,)), Group(TILE_ROWS, 128, (2,))], heads, head_dim)
    assert_close("grouped", batch.run(shared=True), batch.run(False, "torch"), torch.float32)


@pytest.mark.gpu
def test_no_tile_in_use_changes_nothing() -> None:
    batch = make([Group(2, 128, (5,), tiled=False), Group(1, 0, (9,), tiled=False)])
    assert_close("grouped", batch.run(shared=True), batch.run(False, "torch"), torch.float32)


@pytest.mark.gpu
def test_rows_with_larger_splits_read_all_their_kv() -> None:
    """Splits of a row beyond 4096 tokens end elsewhere than its tile's."""
    batch = make([Group(2, 128, (4000, 20))], heads=(2, 1))
    assert batch.kv_len.max() > 4096
    assert_close("grouped", batch.run(shared=True), batch.run(False, "torch"), torch.float32)


@pytest.mark.gpu
def test_rows_of_the_table_may_be_elsewhere() -> None:
    batch = make(MIXED)
    rows = len(batch.kv_len)
    order = torch.randperm(rows + 2)[:rows].to(batch.table.device)
    table = batch.table.new_full((rows + 2, batch.table.shape[1]), 10**6)
    table[order] = batch.table
    got = paged_attention(
        *batch._replace(table=table)[:6],
        scale=batch.q.shape[-1] ** -0.5,
        max_query_len=1,
        table_rows_R=order.int(),
        shared=batch.tiles,
        backend="triton",
    )
    assert torch.equal(got, batch.run(shared=True))


def test_the_reference_needs_no_tiles() -> None:
    batch = make([Group(2, 128, (5,))], device="cpu")
    assert torch.equal(batch.run(True, "torch"), batch.run(False, "torch"))


WIDE = [
    Group(16, 512, (77, 1, 300)),
    Group(1, 0, (500,), tiled=False),
    Group(37, 256, (64, 129)),
    Group(2, 3968, (100,)),
    Group(4, 128, (3,), tiled=False),
    Group(5, 1024, (3500, 9)),
]


@pytest.mark.gpu
@pytest.mark.skipif(triton_device() == "cpu", reason="the interpreter has no bfloat16 dot")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "head_dim"),
    [((12, 2), 128), ((32, 8), 128), ((28, 4), 128), ((14, 2), 64), ((4, 4), 80), ((64, 4), 256)],
)
def test_grouped_is_bit_equal_to_plain(
    heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> None:
    batch = make(WIDE, heads, head_dim, dtype)
    grouped = batch.run(shared=True)
    assert torch.equal(grouped, batch.run(shared=False))
    assert_close("grouped", grouped, batch.run(False, "torch"), dtype)


@pytest.mark.gpu
@pytest.mark.skipif(triton_device() == "cpu", reason="needs the GPU's tensor cores")
def test_a_row_gets_the_same_in_any_group() -> None:
    """The first three rows of a group of sixteen, in a group of three: the same bits."""
    batch = make([Group(16, 512, (77,))], (12, 2), 128, torch.bfloat16)
    few = batch._replace(
        q=batch.q[:3],
        table=batch.table[:3],
        query_start=batch.query_start[:4],
        kv_len=batch.kv_len[:3],
        tiles=tiles_of([Group(3, 512, (77,))], triton_device()),
    )
    assert torch.equal(few.run(shared=True), batch.run(shared=True)[:3])
