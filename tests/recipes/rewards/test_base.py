"""What a reward may return, and the loop that it runs in."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from recipes.rewards.base import LARGEST, Failed, Grade, Item, as_grade
from recipes.rewards.loop_thread import LoopThread
from recipes.rewards.reward_sum import RewardSum


@pytest.mark.parametrize("value", [1, 1.0, True, np.float32(1), np.bool_(True), Decimal(1)])
def test_numbers_and_truth_values_are_rewards(value: Any) -> None:
    assert as_grade(value) == 1.0 and type(as_grade(value)) is float


@pytest.mark.parametrize(
    "value,kind",
    [
        (float("nan"), "not_finite"),
        (-float("inf"), "not_finite"),
        (10**400, "not_finite"),
        (1e39, "not_finite"),
        (None, "not_a_number"),
        ("1.0", "not_a_number"),
        ([1.0], "not_a_number"),
        (np.zeros(2), "not_a_number"),
        (1j, "not_a_number"),
    ],
)
def test_everything_else_is_a_failure_of_a_kind(value: Any, kind: str) -> None:
    grade = as_grade(value)
    assert isinstance(grade, Failed) and grade.kind == kind
    assert str(grade).startswith(f"{kind}: gave ")


async def _name() -> str:
    await asyncio.sleep(0)
    return threading.current_thread().name


def test_a_loop_serves_any_thread_and_one_with_a_loop_of_its_own() -> None:
    loop = LoopThread()
    names = [loop.run(_name())]
    other = threading.Thread(target=lambda: names.append(loop.run(_name())))
    other.start()
    other.join()

    async def within() -> str:
        return loop.run(_name())

    names.append(asyncio.run(within()))
    assert names == ["rewards"] * 3
    loop.close()
    loop.close()
    assert not loop.is_open


def test_a_loop_that_nobody_holds_ends() -> None:
    before = threading.active_count()
    loop = LoopThread()
    loop.run(_name())
    assert threading.active_count() == before + 1
    del loop
    assert threading.active_count() == before


def test_a_sum_beyond_what_is_learned_from_is_a_failure() -> None:
    class Large:
        async def grade(self, items: Sequence[Item]) -> list[Grade]:
            return [as_grade(LARGEST) for _ in items]

        async def close(self) -> None:
            pass

    items: list[Any] = [None]
    (grade,) = asyncio.run(RewardSum([Large(), Large()]).grade(items))
    assert isinstance(grade, Failed) and grade.kind == "not_finite"
    assert np.isfinite(np.square(np.full(1000, LARGEST, dtype=np.float32)).sum())
