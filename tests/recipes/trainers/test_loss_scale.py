"""The scale of a float16 trainer's loss: halved by an overflow, doubled after a while without."""

from __future__ import annotations

import math

import pytest
import torch

from engine.errors import NonFiniteGradient
from recipes.trainers.loss_scale import (
    GROWTH_INTERVAL,
    LossScale,
    loss_scale_of,
    require_smaller,
    scale_figures,
)


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_an_overflow_halves_the_scale_and_refuses_the_step(norm: float) -> None:
    scale = LossScale(value=1024.0)
    assert scale.accept(3.0)
    assert not scale.accept(norm)
    assert (scale.value, scale.skipped, scale.since) == (512.0, 1, 0)
    assert scale.accept(0.0)
    assert scale_figures(scale) == {"train/loss_scale": 512.0, "train/skipped_steps": 1.0}


def test_steps_in_a_row_without_an_overflow_double_it() -> None:
    scale = LossScale(value=1024.0)
    for _ in range(GROWTH_INTERVAL - 1):
        assert scale.accept(1.0)
    scale.accept(math.inf)
    for _ in range(GROWTH_INTERVAL - 1):
        scale.accept(1.0)
        assert scale.value == 512.0
    scale.accept(1.0)
    assert (scale.value, scale.since) == (1024.0, 0)


def test_it_does_not_fall_for_ever() -> None:
    scale = LossScale(value=4.0)
    assert not scale.accept(math.nan) and not scale.accept(math.nan)
    with pytest.raises(NonFiniteGradient, match="loss scale of 1"):
        scale.accept(math.nan)
    assert scale.skipped == 2
    require_smaller(2.0)


def test_it_goes_on_where_it_was() -> None:
    scale, other = LossScale(), LossScale()
    for norm in (1.0, math.inf, 1.0, 1.0):
        scale.accept(norm)
    other.load(scale.state())
    assert other == scale and other.skipped == 1


def test_only_float16_has_one() -> None:
    assert loss_scale_of(torch.bfloat16) is None and loss_scale_of(torch.float32) is None
    assert loss_scale_of(torch.float16) == LossScale()
    assert scale_figures(None) == {}
