"""Several rewards as one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from recipes.rewards.base import Failed, Grade, Item, Reward, as_grade


class RewardSum:
    """A `Reward`: the sum of those of others, which grade side by side. A reply that one of them
    cannot grade has no grade."""

    def __init__(self, parts: Sequence[Reward]) -> None:
        self._parts = parts

    async def grade(self, items: Sequence[Item]) -> list[Grade]:
        """See `Reward`."""
        parts = await asyncio.gather(*(part.grade(items) for part in self._parts))
        return [_sum(grades) for grades in zip(*parts, strict=True)]

    async def close(self) -> None:
        """See `Reward`."""
        for part in self._parts:
            await part.close()


def _sum(grades: Sequence[Grade]) -> Grade:
    total = 0.0
    for grade in grades:
        if isinstance(grade, Failed):
            return grade
        total += grade
    return as_grade(total)
