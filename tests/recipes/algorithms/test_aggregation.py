"""Token weights of each aggregation for responses of 1 and 3 tokens."""

from __future__ import annotations

import pytest

from recipes.algorithms.aggregation import LossAggregation, token_weights


@pytest.mark.parametrize(
    "name,expected",
    [
        ("token-mean", [1 / 4, 1 / 4]),
        ("seq-mean-token-mean", [1 / 2, 1 / 6]),
        ("seq-mean-token-sum", [1 / 2, 1 / 2]),
        ("seq-mean-token-sum-norm", [1 / 20, 1 / 20]),
    ],
)
def test_weights(name: LossAggregation, expected: list[float]) -> None:
    assert token_weights([1, 3], name, max_length=10).tolist() == pytest.approx(expected)


def test_unknown_aggregation_is_refused() -> None:
    with pytest.raises(ValueError, match="median"):
        token_weights([1], "median", 1)  # type: ignore[arg-type]
