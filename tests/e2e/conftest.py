"""Runs from flags to folder, all without a picture."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def runs_draw_nothing(no_plots: None) -> None:
    """See `no_plots`."""
