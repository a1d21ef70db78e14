"""The Triton back end's host side: which step a captured batch replays, and what it reads.

The kernels themselves are tested under tests/kernels, graphs under tests/engine/test_graphs.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.attention import triton
from engine.attention.base import DecodeLayout
from engine.attention.groups import find_groups
from engine.attention.triton import TritonBackend, group_rule
from engine.kv.layout import HeadLayout
from tests.helpers.head_pools import head_pool

PAGE, COLUMNS, ROWS, SLOTS = 16, 300, 80, 90


@pytest.fixture(autouse=True)
def few_bytes_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "SAVED_BYTES", 1)
    monkeypatch.setattr(triton, "PROGRAMS", 2)


def backend(
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 8,
    windows: tuple[int | None, ...] = (None,),
    **options,
) -> TritonBackend:
    pool = head_pool(
        num_layers=len(windows),
        num_pages=1,
        page_size=PAGE,
        num_kv_heads=2,
        head_dim=head_dim,
        dtype=dtype,
        windows=windows,
    )
    return TritonBackend(pool, scale=1.0, **options)


def layout(rows: int = ROWS) -> DecodeLayout:
    """Rows of nobody; every slot has pages of its own."""
    host_pages = np.arange(SLOTS * COLUMNS, dtype=np.int32).reshape(SLOTS, COLUMNS)
    return DecodeLayout(
        rows=rows,
        slots_R=torch.zeros(rows, dtype=torch.int32),
        kv_lens_R=torch.ones(rows, dtype=torch.int32),
        write_slots_R=torch.zeros(rows, dtype=torch.int64),
        query_start_R1=torch.arange(rows + 1, dtype=torch.int32),
        page_table=torch.from_numpy(host_pages),
        host_pages=host_pages,
        max_kv_len=COLUMNS * PAGE,
        page_size=PAGE,
    )


def rows_of(slots: list[int], length: int, padded: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    packed = np.full((2, padded), 1, dtype=np.int32)
    packed[0] = SLOTS - 1
    packed[0, : len(slots)], packed[1, : len(slots)] = slots, length
    return packed[0], packed[1]


def share(where: DecodeLayout, slots: range, tokens: int) -> None:
    where.host_pages[slots, : tokens // PAGE] = where.host_pages[slots[0], : tokens // PAGE]


def test_a_group_takes_the_grouped_step_and_its_rows_reach_the_device() -> None:
    where = layout()
    share(where, range(8, 24), 512)
    captured = backend().capture_decode(where)
    plain = captured.step
    assert plain.shared is None
    captured.refresh(*rows_of(list(range(60)), 600))
    tiles = captured.step.shared
    assert tiles is not None
    assert tiles.tile_T3[0].tolist() == [8, 16, 512] and not tiles.tile_T3[1:].any()
    assert tiles.tokens_R.tolist() == [0] * 8 + [512] * 16 + [0] * (ROWS - 24)
    # Half of the group is left, and the other rows move up.
    grouped = captured.step
    captured.refresh(*rows_of([*range(12, 20), *range(30, 70)], 601))
    assert captured.step is grouped and captured.step.shared is tiles, "buffers of a graph stay"
    assert tiles.tile_T3[0].tolist() == [0, 8, 512] and not tiles.tile_T3[1:].any()
    assert tiles.tokens_R.tolist() == [512] * 8 + [0] * (ROWS - 8)
    captured.refresh(*rows_of(list(range(24, 84)), 602))
    assert captured.step is plain


def test_a_layer_with_a_window_has_its_window_and_shares_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    monkeypatch.setattr(triton, "paged_attention", lambda *_, **options: calls.append(options))
    where = layout()
    share(where, range(8, 24), 512)
    served = backend(windows=(64, None, 128))
    captured = served.capture_decode(where)
    captured.refresh(*rows_of(list(range(60)), 600))
    tiles = captured.step.shared
    assert tiles is not None
    for layer in range(3):
        captured.step.attend(layer, torch.zeros(ROWS, 2, 8))
    assert [call["window"] for call in calls] == [64, None, 128]
    assert [call["shared"] for call in calls] == [None, tiles, None]


def test_two_layouts_each_get_the_groups_that_one_of_them_found() -> None:
    both = backend()
    where, smaller = layout(), layout(64)
    share(where, range(16), 512)
    share(smaller, range(16), 512)
    first, second = both.capture_decode(where), both.capture_decode(smaller)
    first.refresh(*rows_of(list(range(70)), 600))
    second.refresh(*rows_of(list(range(60)), 601, 64))
    first.refresh(*rows_of(list(range(64)), 602))
    for captured in (first, second):
        assert captured.step.shared.tile_T3[0].tolist() == [0, 16, 512]


@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.float32}, {"head_dim": 256}, {"share_prefixes": False}],
    ids=["float32", "wide heads", "not wanted"],
)
def test_no_groups_where_tiles_gain_nothing(options) -> None:
    where = layout()
    share(where, range(16), 512)
    captured = backend(**options).capture_decode(where)
    captured.refresh(*rows_of(list(range(60)), 600))
    assert captured.step.shared is None


def prompt_groups(groups: int, samples: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = groups * samples, (tokens + 64) // PAGE
    pages = np.arange(rows * columns, dtype=np.int32).reshape(groups, samples, columns)
    pages[:, :, : tokens // PAGE] = pages[:, :1, : tokens // PAGE]
    return pages.reshape(rows, columns), np.full(rows, tokens + 64)


@pytest.mark.parametrize(
    ("kv_heads", "groups", "samples", "tokens", "worth"),
    [
        (2, 64, 16, 512, True),
        (2, 64, 16, 1024, True),
        (8, 16, 16, 512, True),
        (4, 32, 8, 1024, True),
        (2, 64, 3, 512, False),
        (2, 8, 16, 512, False),
        (2, 64, 16, 128, False),
        (8, 1, 64, 2048, False),
    ],
)
def test_only_batches_that_save_much_on_a_full_gpu_are_grouped(
    kv_heads: int, groups: int, samples: int, tokens: int, worth: bool, monkeypatch
) -> None:
    monkeypatch.undo()
    layout = HeadLayout(num_kv_heads=kv_heads, key_dim=128, value_dim=128, dtype=torch.bfloat16)
    rule = group_rule(layout)
    found = find_groups(*prompt_groups(groups, samples, tokens), PAGE, rule)
    assert len(found) == (groups if worth else 0)
