"""Runs from flags to folder, without the picture of their curves, which takes longer than their
steps (tests/recipes/test_grpo.py has it drawn)."""

from __future__ import annotations

import pytest

from recipes.run.run_folder import RunFolder


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunFolder, "draw_plots", lambda self: None)
