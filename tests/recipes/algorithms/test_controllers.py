"""The adaptive weight of the KL against numbers worked out by hand."""

from __future__ import annotations

import pytest

from recipes.algorithms.controllers import adapted


@pytest.mark.parametrize("kl,expected", [(12.0, 0.100512), (6.3, 0.100128), (3.0, 0.099488)])
def test_the_weight_follows_the_kl(kl: float, expected: float) -> None:
    assert adapted(0.1, kl, target=6.0, horizon=10_000, num=256) == pytest.approx(expected)


def test_at_its_target_the_weight_stays() -> None:
    assert adapted(0.1, 6.0, target=6.0, horizon=10_000, num=256) == 0.1
