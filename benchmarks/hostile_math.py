"""How long hostile replies delay the grading of a step: 64 replies whose mathematics would take
for ever, through the graders of a run.

    python benchmarks/hostile_math.py [--replies 64] [--processes N]

Prints, for each kind alone and for all mixed, the seconds beside those of as many harmless replies,
and what became of the hostile ones.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping

import checkout  # noqa: F401
import numpy as np

from recipes.rewards.base import Failed, Grade, Item
from recipes.rewards.graders.pool import MOST_PROCESSES
from recipes.rewards.grading import Grading
from recipes.rewards.math import MATH
from recipes.rewards.task_reward import TaskGrader
from recipes.types import Problem

KINDS: Mapping[str, Callable[[int], str]] = {
    "tower of powers": lambda n: f"It is $9^{{{n}^{{9^{{9^9}}}}}}$",
    "plain tower": lambda n: f"The answer is 9**9**9**{n}",
    "huge power": lambda n: f"$10^{{{n}00000000}}$",
    "factorial": lambda n: f"It is ${n}99999999!$",
    "tower of factorials": lambda n: f"$(({n}!)!)!$",
    "nested fractions": lambda n: "$" + r"\frac{1}{1+" * (60 + n) + "1" + "}" * (60 + n) + "$",
    "a million digits": lambda n: f"The answer is {n}" + "9" * 10**6,
    "a million decimals": lambda n: f"It is $0.{n}" + "3" * 10**6 + "$",
}


class Mathematics:
    """A task's grader, as a file of problems has it."""

    grader = MATH

    def grading(self, reply: str, problem: Problem) -> tuple[str, ...]:
        """See `GradedBeside`."""
        return (reply, problem.answer)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replies", type=int, default=64)
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, MOST_PROCESSES))
    arguments = parser.parse_args()
    num = arguments.replies
    grading = Grading(TaskGrader(Mathematics(), num_processes=arguments.processes))
    plain = [f"The answer is {n + 1}" for n in range(num)]
    print(f"{num} replies, {arguments.processes} processes")
    print(f"{'start and first batch':24}{_seconds(grading, plain)[0]:8.2f} s")
    harmless, _ = _seconds(grading, plain)
    print(f"{'harmless':24}{harmless:8.2f} s")
    for name, make in KINDS.items():
        _report(name, grading, [make(n + 1) for n in range(num)], harmless)
    makers = list(KINDS.values())
    mixed = [makers[n % len(makers)](n + 1) for n in range(num)]
    _report("all kinds", grading, mixed, harmless)
    grading.close()


def _report(name: str, grading: Grading, replies: list[str], harmless: float) -> None:
    seconds, grades = _seconds(grading, replies)
    outcome = Counter(g.kind if isinstance(g, Failed) else f"reward {g:g}" for g in grades)
    told = ", ".join(f"{count} {kind}" for kind, count in outcome.most_common())
    print(f"{name:24}{seconds:8.2f} s, delay {seconds - harmless:6.2f} s: {told}", flush=True)


def _seconds(grading: Grading, replies: list[str]) -> tuple[float, list[Grade]]:
    problem = Problem(question="How much is it?", answer="8", key="")
    items = [
        Item(problem=problem, messages=[], reply=reply, reply_ids=np.zeros(1, np.int32))
        for reply in replies
    ]
    started = time.perf_counter()
    grades = grading(items)
    return time.perf_counter() - started, grades


if __name__ == "__main__":
    main()
