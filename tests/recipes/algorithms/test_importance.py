"""Importance weights by level and mode."""

from __future__ import annotations

import math

import pytest
import torch

from recipes.algorithms.importance import (
    ImportanceLevel,
    ImportanceMode,
    accepted,
    importance_weights,
    near,
)

ROLLOUT = torch.zeros(4)
OLD = torch.log(torch.tensor([1.5, 3.0, 0.2, 1.0]))
SEQUENCE = torch.tensor([0, 0, 1, 1])


def weights(level: ImportanceLevel, mode: ImportanceMode) -> list[float]:
    got = importance_weights(OLD, ROLLOUT, SEQUENCE, 2, level=level, mode=mode, cap=2.0)
    return got.tolist()


def test_no_correction_is_one() -> None:
    assert weights("none", "truncate") == [1.0] * 4


def test_token_level() -> None:
    assert weights("token", "truncate") == pytest.approx([1.5, 2.0, 0.2, 1.0])
    assert weights("token", "mask") == pytest.approx([1.5, 0.0, 0.0, 1.0])


def test_sequence_level_is_the_product() -> None:
    assert weights("sequence", "truncate") == pytest.approx([2.0, 2.0, 0.2, 0.2])
    assert weights("sequence", "mask") == [0.0] * 4


def test_weights_carry_no_gradient_and_stay_finite() -> None:
    old = torch.full((100,), 5.0, requires_grad=True)
    got = importance_weights(
        old,
        torch.zeros(100),
        torch.zeros(100, dtype=torch.int64),
        1,
        level="sequence",
        mode="truncate",
        cap=math.inf,
    )
    assert not got.requires_grad and torch.isfinite(got).all()


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="drop"):
        weights("token", "drop")  # type: ignore[arg-type]


LOG_WEIGHTS = torch.tensor([0.1, -1.5, 0.8, -10.0, 0.3])
ONE_SEQUENCE = torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("level", "mode", "cap", "floor", "expected"),
    [
        ("token", "truncate", 2.0, None, [1.105, 0.223, 2.0, 4.54e-5, 1.350]),
        ("token", "zero", 5.0, 0.5, [1.105, 0.0, 2.226, 0.0, 1.350]),
        ("token", "zero", 2.0, None, [1.105, 0.223, 0.0, 4.54e-5, 1.350]),
        ("token", "mask", 2.0, None, [1.105, 0.0, 0.0, 0.0, 1.350]),
        ("geometric", "truncate", 2.0, None, [0.1275] * 5),
        ("geometric", "mask", 2.0, None, [0.0] * 5),
        ("geometric", "mask", 2.0, 0.1, [0.1275] * 5),
    ],
    ids=["TIS", "IcePop", "AReaL", "MIS", "geometric", "far", "near"],
)
def test_weights_by_hand(level, mode, cap, floor, expected) -> None:
    """The log weights are .1, -1.5, .8, -10 and .3; their mean is -2.06."""
    got = importance_weights(
        LOG_WEIGHTS, torch.zeros(5), ONE_SEQUENCE, 1, level=level, mode=mode, cap=cap, floor=floor
    )
    assert got.tolist() == pytest.approx(expected, rel=1e-3)


def test_replies_that_are_far_by_k3_are_left_out() -> None:
    """k3 of log w: e^w - 1 - w. Of (.1, -1.5) the mean is (.00517 + .72313) / 2 = .36415, of .8
    it is .42554, of (-10, .3) it is 4.52495."""
    sequence = torch.tensor([0, 0, 1, 2, 2])
    for most, expected in ((0.3, "00000"), (0.37, "11000"), (0.43, "11100"), (4.6, "11111")):
        kept = near(LOG_WEIGHTS, torch.zeros(5), sequence, 3, max_k3=most)
        assert kept.tolist() == [digit == "1" for digit in expected], most


def test_rejected_tokens_are_those_outside_the_cap() -> None:
    """log w (.1, -1.5, .8, -10, .3) within [1/2, 2] keeps the first and the last."""
    old = torch.tensor([0.1, -1.5, 0.8, -10.0, 0.3])
    sequence = torch.zeros(5, dtype=torch.int64)
    kept = accepted(old, torch.zeros(5), sequence, 1, level="token", cap=2.0)
    assert kept.tolist() == [True, False, False, False, True]
    assert not accepted(old, torch.zeros(5), sequence, 1, level="sequence", cap=2.0).any()
