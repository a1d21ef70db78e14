"""Learning-rate schedules at their corners."""

from __future__ import annotations

import pytest

from recipes.trainers.schedule import Schedule, learning_rate


def rates(schedule: Schedule, steps: list[int], warmup: int = 0) -> list[float]:
    return [
        learning_rate(s, peak=1.0, schedule=schedule, warmup_steps=warmup, total_steps=10)
        for s in steps
    ]


def test_shapes() -> None:
    assert rates("constant", [0, 5, 9]) == [1.0, 1.0, 1.0]
    assert rates("linear", [0, 5, 10, 12]) == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert rates("cosine", [0, 5, 10]) == pytest.approx([1.0, 0.5, 0.0])


def test_warmup_rises_to_the_peak() -> None:
    assert rates("constant", [0, 1, 2, 3, 4], warmup=3) == pytest.approx(
        [0.25, 0.5, 0.75, 1.0, 1.0]
    )
    assert rates("linear", [4, 10], warmup=4) == pytest.approx([1.0, 0.0])


def test_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="step"):
        rates("step", [0])  # type: ignore[arg-type]
