"""Problems from a file: one JSON object a line with a prompt and an answer."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import msgspec

from engine.errors import InvalidRequest
from recipes.rewards.math import MATH, math_match
from recipes.rewards.worker import GraderSpec
from recipes.types import Message, Problem
from rollout.offline import JsonLine, parse_line, read_lines

EXAMPLE = '{"prompt": text, "answer": text or number}'


class Line(msgspec.Struct, frozen=True):
    """One line: exactly `prompt` (text) and `answer` are read; other keys may be there."""

    prompt: str
    answer: str | int | float


@dataclass(frozen=True, kw_only=True, slots=True)
class Numbered:
    """A problem and the number of its line."""

    number: int
    problem: Problem


@dataclass(frozen=True, kw_only=True)
class JsonLines:
    """A file of problems verified by math-verify; an `Environment`. The key is the prompt."""

    name: str
    path: Path
    lines: tuple[Numbered, ...]
    max_new_tokens: int = 256
    heldout_one_in: int = 8

    def draw(self, rng: random.Random) -> Problem:
        """Any line of the file, with replacement."""
        return rng.choice(self.lines).problem

    def messages(self, problem: Problem) -> list[Message]:
        """The prompt as the one user turn."""
        return [{"role": "user", "content": problem.question}]

    @property
    def grader(self) -> GraderSpec:
        """See `GradedBeside`."""
        return MATH

    def grading(self, reply: str, problem: Problem) -> tuple[str, ...]:
        """See `GradedBeside`."""
        return (reply, problem.answer)

    def verify(self, reply: str, problem: Problem) -> float:
        """1.0 if the reply's last expression equals the answer mathematically."""
        return math_match(reply, problem.answer)


def load_jsonl(path: Path) -> JsonLines:
    """Read the problems of a file, plain or gzip. Raises InvalidRequest naming the line that cannot
    be read."""
    lines = tuple(_numbered(line) for line in read_lines(path, field="task"))
    if not lines:
        raise InvalidRequest(
            f"task: {path} holds no problems; each line is {EXAMPLE}", field="task"
        )
    return JsonLines(name=path.name.split(".jsonl")[0], path=path, lines=lines)


def _numbered(line: JsonLine) -> Numbered:
    entry = parse_line(line, Line, field="task", example=EXAMPLE)
    answer = str(entry.answer)
    for name, text in (("prompt", entry.prompt), ("answer", answer)):
        if not text.strip():
            raise InvalidRequest(
                f"task: {line.where}: the {name} is empty; write it, or leave the line out",
                field="task",
            )
    problem = Problem(question=entry.prompt, answer=answer, key=entry.prompt)
    return Numbered(number=line.number, problem=problem)
