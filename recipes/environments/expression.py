"""A task whose replies are programs: an expression over given numbers that hits a target."""

from __future__ import annotations

import random
import re

from recipes.environments.few_shot import FewShot
from recipes.rewards.programs.tested import Tested
from recipes.sandbox.program import Program
from recipes.sandbox.sandbox import Sandbox
from recipes.types import Message, Problem

LEAST, MOST = 2, 12
OPERATORS = "+-*"
NUMBERS = "numbers"
FORM = re.compile(r"[0-9+*() -]{1,40}")
"""What a reply may be made of: nothing else reaches the interpreter."""


class Expression:
    """Two numbers and a target that one of their sum, difference and product is; an `Environment`
    and a `GradedByCode`: the reply is evaluated in the sandbox. Any expression over both numbers,
    each once, that has the value is right."""

    def __init__(self) -> None:
        self._asked = FewShot(
            name="expression",
            max_new_tokens=12,
            heldout_one_in=4,
            generate=_draw,
            examples=(_problem(9, "-", 4), _problem(3, "*", 7), _problem(6, "+", 8)),
            instruction="Reply with the expression only.",
        )
        self.name = self._asked.name
        self.max_new_tokens = self._asked.max_new_tokens
        self.heldout_one_in = self._asked.heldout_one_in

    def draw(self, rng: random.Random) -> Problem:
        """Any problem but the worked examples."""
        return self._asked.draw(rng)

    def messages(self, problem: Problem) -> list[Message]:
        """Worked examples and the question."""
        return self._asked.messages(problem)

    def tested(self, reply: str, problem: Problem) -> Tested:
        """See `GradedByCode`."""
        expression = reply.strip()
        if not FORM.fullmatch(expression):
            return Tested(code="", asserts=("assert False",))
        numbers = sorted(int(number) for number in re.findall(r"\d+", expression))
        return Tested(
            code=f"value = eval({expression!r})",
            asserts=(
                f"assert {numbers} == {sorted(problem.columns[NUMBERS])}",
                f"assert value == {problem.columns['target']}",
            ),
        )

    def verify(self, reply: str, problem: Problem) -> float:
        """1.0 for an expression that hits the target, run in a sandbox of its own."""
        tested = self.tested(reply, problem)
        sandbox = Sandbox(num_processes=1)
        try:
            program = Program(code=tested.code, asserts=tested.asserts)
            return float(all(sandbox.submit(program).result().passed))
        finally:
            sandbox.close()


def _draw(rng: random.Random) -> Problem:
    return _problem(rng.randint(LEAST, MOST), rng.choice(OPERATORS), rng.randint(LEAST, MOST))


def _problem(first: int, operator: str, second: int) -> Problem:
    """The larger number comes first, so that no target is negative."""
    larger, smaller = max(first, second), min(first, second)
    target = {"+": larger + smaller, "-": larger - smaller, "*": larger * smaller}[operator]
    return Problem(
        question=f"Make {target} from {larger} and {smaller}.",
        answer=f"{larger} {operator} {smaller}",
        key=f"{target} {larger} {smaller}",
        columns={NUMBERS: [larger, smaller], "target": target},
    )
