"""How products of experts are cut: every shape fits a GPU, every pair has a tile."""

from __future__ import annotations

import random

import pytest

from kernels.moe.plan import ByPair, ByTile, Tile, choose, choose_logits, num_tiles

SHARED_BYTES = 227 << 10
MOST_SUMS = 128
"""Of a thread, which has 255 registers."""
SHAPES = {
    "qwen3 30b": (128, 8, 2048, 768),
    "qwen3 30b, a quarter of the inner width": (128, 8, 2048, 192),
    "qwen3 235b": (128, 8, 4096, 1536),
    "mixtral": (8, 2, 4096, 14336),
    "deepseek v2": (160, 6, 5120, 1536),
    "deepseek v3": (256, 8, 7168, 2048),
    "tiny": (8, 2, 64, 32),
    "odd": (7, 3, 100, 63),
}
ROWS = (1, 4, 5, 16, 17, 64, 128, 256, 1024, 4096, 65536)


@pytest.mark.parametrize("name", SHAPES)
def test_every_plan_fits_a_gpu(name: str) -> None:
    experts, top_k, hidden, inner = SHAPES[name]
    for rows in ROWS:
        config = choose(rows, top_k, experts, hidden, inner)
        if isinstance(config, ByPair):
            assert rows <= 4
            for half, ins in ((config.up, hidden), (config.down, inner)):
                # Rows that are not read in pieces of 16 bytes by every thread are summed by fewer.
                assert half.warps == 1 or ins >= 256 * half.warps
            continue
        for tile, parts in ((config.up, 2), (config.down, 1)):
            features = parts * tile.block_o
            shared = tile.stages * 2 * tile.block_i * (features + config.block_p)
            assert shared <= SHARED_BYTES
            assert features * config.block_p // (32 * tile.warps) <= MOST_SUMS
            assert tile.block_o % (16 * tile.warps) == 0


def test_few_rows_have_plans_that_do_not_follow_them() -> None:
    """So that up to 4 rows get the same bits, and so do those of one size of tile."""
    for experts, top_k, hidden, inner in SHAPES.values():
        assert len({choose(rows, top_k, experts, hidden, inner) for rows in (1, 2, 3, 4)}) == 1
        tiles: dict[int, set[tuple[Tile, Tile]]] = {}
        for rows in range(5, 3000, 7):
            config = choose(rows, top_k, experts, hidden, inner)
            assert isinstance(config, ByTile)
            tiles.setdefault(config.block_p, set()).add((config.up, config.down))
        assert all(len(configs) == 1 for configs in tiles.values())


def test_tiles_grow_with_the_pairs_of_an_expert() -> None:
    sizes = [choose(rows, 8, 128, 2048, 768).block_p for rows in (16, 128, 256, 512, 4096)]  # type: ignore[union-attr]
    assert sizes == [16, 16, 32, 64, 128]


def test_logits_are_summed_alike_for_any_number_of_rows() -> None:
    configs = {choose_logits(rows) for rows in ROWS}
    assert len({config.part for config in configs}) == 1
    for config in configs:
        assert config.part % config.block_i == 0 and config.block_n < 64


@pytest.mark.parametrize("block_p", [16, 128])
def test_tiles_of_slots_lie_behind_each_other_and_in_the_table(block_p: int) -> None:
    """By the place where `kernels/moe/sort.py` begins those of a slot."""
    draw = random.Random(0)
    for _ in range(300):
        slots, most = draw.randint(1, 40), draw.choice([1, 5, 100, 1000])
        counts = [draw.choice([0, draw.randint(0, most)]) for _ in range(slots)]
        pairs = sum(counts) + draw.choice([0, draw.randint(0, 50)])
        table = num_tiles(pairs, slots, block_p)
        by_pair = table == pairs
        before, end = 0, 0
        for slot, count in enumerate(counts):
            first = before if by_pair else before // block_p + slot
            assert first >= end
            end, before = first + -(-count // block_p), before + count
        assert end <= table
