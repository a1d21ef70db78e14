"""What is around the loop of a recipe."""

from __future__ import annotations

import logging

import pytest

from recipes.grpo import train
from recipes.run.command import run_recipe
from recipes.settings.options import RunOptions


def test_requests_to_services_are_no_lines_of_the_display(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logging.getLogger("httpx").setLevel(logging.NOTSET)
    assert run_recipe(train, RunOptions(), ["--model", "no/such/model"]) != 0
    assert "no/such/model" in capsys.readouterr().err
    assert not logging.getLogger("httpx").isEnabledFor(logging.INFO)
