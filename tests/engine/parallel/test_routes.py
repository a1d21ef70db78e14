"""The table of ways: whatever it sends by mapped memory fits there."""

from __future__ import annotations

import pytest

from engine.parallel.routes import MAILBOX_BYTES, routes_of
from kernels.collectives.mailbox import NUM_LANES, words_shape

SIZES = [2, 3, 4, 5, 6, 7, 8, 12, 16]


@pytest.mark.parametrize("size", SIZES)
def test_what_is_sent_by_mapped_memory_fits_there(size: int) -> None:
    routes = routes_of(size)
    source_bytes = 4 * NUM_LANES * words_shape(size, MAILBOX_BYTES)[-1]
    assert max(routes.one_shot, routes.gather, routes.scatter) <= source_bytes
    assert routes.two_shot >= routes.one_shot


@pytest.mark.parametrize("size", SIZES)
def test_a_norm_is_fused_where_its_rows_fit_the_lanes(size: int) -> None:
    """Rows go to lanes whole, so a lane holds some of them at most."""
    lane_bytes = 4 * words_shape(size, MAILBOX_BYTES)[-1]
    for row_bytes in (1152, 3072, 8192, 16384):
        rows = routes_of(size).normed // row_bytes
        assert -(-rows // NUM_LANES) * row_bytes <= lane_bytes


def test_shots_by_size() -> None:
    routes = routes_of(4)
    assert routes.shots(4) == 1
    assert routes.shots(routes.one_shot) == 1
    assert routes.shots(routes.one_shot + 1) == 2
    assert routes.shots(routes.two_shot + 1) == 0
