"""The reward of programs: a reply's code is run in the sandbox against its problem's tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from recipes.rewards.base import Failed, Grade, Item
from recipes.rewards.programs.code_options import CodeOptions, CodeScore
from recipes.rewards.programs.tested import Tested, column_tests
from recipes.sandbox.program import Limits, Outcome, Program
from recipes.sandbox.sandbox import Sandbox
from recipes.types import Problem

WALL_FACTOR = 6
"""Seconds of the clock for one of processor time."""


class CodeReward:
    """A `Reward`. What goes wrong in a program (an error, a limit, a wrong answer) is a test that
    it does not pass; only a sandbox that did not run it leaves a reply without a grade.

    score: "all" gives 1.0 for a program that passes all its tests, "share" the share that it
    passes. tested: the program of a reply and its tests.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        *,
        score: CodeScore = "all",
        tested: Callable[[str, Problem], Tested] = column_tests,
    ) -> None:
        self._sandbox = sandbox
        self._score = score
        self._tested = tested

    async def grade(self, items: Sequence[Item]) -> list[Grade]:
        """See `Reward`. Equal programs with equal tests are run once.

        Raises InvalidRequest (`reward`) for a problem without tests."""
        asked = [self._tested(item.reply, item.problem) for item in items]
        different = list(dict.fromkeys(asked))
        grades = await asyncio.gather(*(self._grade(each) for each in different))
        known = dict(zip(different, grades, strict=True))
        return [known[each] for each in asked]

    async def close(self) -> None:
        """See `Reward`."""
        await asyncio.to_thread(self._sandbox.close)

    async def _grade(self, tested: Tested) -> Grade:
        if tested.pairs:
            return await self._by_pairs(tested)
        outcome = await self._sandbox.run(Program(code=tested.code, asserts=tested.asserts))
        return self._graded(outcome, list(outcome.passed))

    async def _by_pairs(self, tested: Tested) -> Grade:
        """One run after the other: a program that is out of time once is not run again, and one
        that must pass all ends at the first that it does not pass."""
        passed = [False] * len(tested.pairs)
        outcome = Outcome()
        for number, (stdin, stdout) in enumerate(tested.pairs):
            outcome = await self._sandbox.run(Program(code=tested.code, stdin=stdin))
            passed[number] = outcome.finished and _lines(outcome.stdout) == _lines(stdout)
            if outcome.failed or outcome.ended in ("cpu", "wall"):
                break
            if self._score == "all" and not passed[number]:
                break
        return self._graded(outcome, passed)

    def _graded(self, outcome: Outcome, passed: list[bool]) -> Grade:
        if outcome.failed:
            return Failed(kind="died", reason=f"the sandbox: {outcome.failed}")
        return float(all(passed)) if self._score == "all" else sum(passed) / len(passed)


def code_reward(
    options: CodeOptions,
    *,
    num_processes: int | None = None,
    tested: Callable[[str, Problem], Tested] = column_tests,
) -> CodeReward:
    """The reward that options describe. num_processes: that run programs; None takes one a core.

    Raises InvalidRequest (`sandbox`) on a machine that cannot
    confine a program."""
    limits = Limits(
        cpu_s=options.code_seconds,
        wall_s=float(WALL_FACTOR * options.code_seconds),
        memory_bytes=int(options.code_memory_gb * (1 << 30)),
    )
    sandbox = Sandbox(limits=limits, policy=options.sandbox, num_processes=num_processes)
    return CodeReward(sandbox, score=options.code_reward, tested=tested)


def _lines(text: str) -> list[str]:
    """White space at the ends of lines, and of all, does not count."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
