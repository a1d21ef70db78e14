"""The KV pool in one piece and in several: the same pages under every layer."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from engine.kv.layout import HeadLayout, PagePart, page_bytes
from engine.kv.pool import KVPool
from kernels.quant.fp8_kv import as_bytes
from tests.helpers.head_pools import head_pool

LAYER_BYTES = 6 * 4 * 2 * 8 * 4


def make(piece_bytes: int) -> KVPool:
    return head_pool(
        num_layers=5,
        num_pages=6,
        page_size=4,
        num_kv_heads=2,
        head_dim=8,
        dtype=torch.float32,
        piece_bytes=piece_bytes,
    )


@pytest.mark.parametrize(
    ("piece_bytes", "sizes"),
    [
        (1, [1, 1, 1, 1, 1]),
        (2 * LAYER_BYTES, [2, 2, 1]),
        (3 * LAYER_BYTES - 1, [2, 2, 1]),
        (100 * LAYER_BYTES, [5]),
    ],
)
def test_pieces_hold_whole_layers(piece_bytes: int, sizes: list[int]) -> None:
    pool = make(piece_bytes)
    assert [len(k) for k, _ in pool.pieces] == sizes
    assert all(k.shape[1:] == (6, 4, 2, 8) and v.shape == k.shape for k, v in pool.pieces)
    assert not any(tensor.any() for tensor in pool.tensors())


@pytest.mark.parametrize("piece_bytes", [1, 2 * LAYER_BYTES, 100 * LAYER_BYTES])
def test_layers_are_apart_and_copied_alike(piece_bytes: int) -> None:
    pool = make(piece_bytes)
    for index in range(5):
        for part, pages in enumerate(pool.layer(index)):
            pages[1] = 10 * index + part + 1
    pool.copy(torch.tensor([1]), torch.tensor([4]))
    for index in range(5):
        for part, pages in enumerate(pool.layer(index)):
            assert (pages[4] == 10 * index + part + 1).all()
            assert not pages[[0, 2, 3, 5]].any()


def test_layers_that_store_otherwise_have_tensors_of_their_own() -> None:
    wide = HeadLayout(num_kv_heads=2, key_dim=8, value_dim=6, dtype=torch.float32)
    narrow = HeadLayout(num_kv_heads=1, key_dim=4, value_dim=4, dtype=torch.bfloat16, window=5)
    layouts = [wide, narrow, wide, narrow]
    pool = KVPool(layouts, num_pages=6, page_size=4, device=torch.device("cpu"))
    assert [[t.shape[:2] for t in piece] for piece in pool.pieces] == [[(2, 6), (2, 6)]] * 2
    for index, layout in enumerate(layouts):
        k, v = pool.layer(index)
        assert k.shape == (6, 4, layout.num_kv_heads, layout.key_dim)
        assert v.shape == (6, 4, layout.num_kv_heads, layout.value_dim)
        assert k.dtype == v.dtype == layout.dtype
        k[1], v[1] = index + 1, -index - 1
    pool.copy(torch.tensor([1]), torch.tensor([4]))
    for index in range(len(layouts)):
        k, v = pool.layer(index)
        assert (k[4] == index + 1).all() and (v[4] == -index - 1).all()
    size = sum(tensor.nbytes for tensor in pool.tensors())
    assert 6 * page_bytes(layouts, 4) == size


@dataclass(frozen=True)
class Latent:
    """One latent of a token in place of heads, its scales, and a key part that keeps its dtype."""

    window: int | None = None
    parts: tuple[PagePart, ...] = (
        PagePart(name="latent", shape=(24,), dtype=torch.float8_e4m3fn),
        PagePart(name="scale", shape=(3,), dtype=torch.bfloat16, tokens_last=True),
        PagePart(name="rotated", shape=(8,), dtype=torch.bfloat16),
    )


def test_a_pool_keeps_any_parts_beside_heads() -> None:
    heads = HeadLayout(num_kv_heads=2, key_dim=8, value_dim=8, dtype=torch.float32)
    layouts = [Latent(), heads, Latent()]
    pool = KVPool(layouts, num_pages=6, page_size=4, device=torch.device("cpu"))
    shapes = [(6, 4, 24), (6, 3, 4), (6, 4, 8)]
    for index in (0, 2):
        assert [t.shape for t in pool.layer(index)] == shapes
        for part in pool.layer(index):
            as_bytes(part)[1] = index + 1
    pool.copy(torch.tensor([1]), torch.tensor([4]))
    for index in (0, 2):
        for part in pool.layer(index):
            assert (as_bytes(part)[4] == index + 1).all()
    assert page_bytes(layouts, 4) == 4 * (2 * (24 + 3 * 2 + 8 * 2) + 2 * 2 * 8 * 4)
    assert 6 * page_bytes(layouts, 4) == sum(t.nbytes for t in pool.tensors())


def test_scales_lie_beside_the_pages_that_they_belong_to() -> None:
    layout = HeadLayout(num_kv_heads=2, key_dim=8, value_dim=8, dtype=torch.bfloat16, scaled=True)
    pool = KVPool([layout] * 3, num_pages=6, page_size=4, device=torch.device("cpu"))
    k, v, k_scale, v_scale = pool.layer(2)
    assert k.shape == v.shape == (6, 4, 2, 8) and k.dtype == v.dtype == torch.float8_e4m3fn
    assert k_scale.shape == v_scale.shape == (6, 2, 4) and k_scale.dtype == torch.bfloat16
    assert page_bytes([layout] * 3, 4) == 3 * 4 * 2 * 2 * (8 + 2)
    assert 6 * page_bytes([layout] * 3, 4) == sum(t.nbytes for t in pool.tensors())
    assert not any(as_bytes(tensor).any() for tensor in pool.tensors())
