"""Problems from a file: one JSON object a line with a prompt and an answer."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import InvalidRequest
from recipes.rewards.math import math_match
from recipes.types import Message, Problem


class Line(msgspec.Struct, frozen=True):
    """One line: exactly `prompt` (text) and `answer` are read; other keys may be there."""

    prompt: str
    answer: str | int | float


@dataclass(frozen=True, kw_only=True)
class JsonLines:
    """A file of problems verified by math-verify; an `Environment`. The key is the prompt."""

    name: str
    problems: tuple[Problem, ...]
    max_new_tokens: int = 256
    heldout_one_in: int = 8

    def draw(self, rng: random.Random) -> Problem:
        """Any line of the file, with replacement."""
        return rng.choice(self.problems)

    def messages(self, problem: Problem) -> list[Message]:
        """The prompt as the one user turn."""
        return [{"role": "user", "content": problem.question}]

    def verify(self, reply: str, problem: Problem) -> float:
        """1.0 if the reply's last expression equals the answer mathematically."""
        return math_match(reply, problem.answer)


def load_jsonl(path: Path) -> JsonLines:
    """Read the problems. Raises InvalidRequest naming the line that cannot be read."""
    if not path.is_file():
        raise InvalidRequest(f"task: no file {path}", field="task")
    lines = path.read_text(encoding="utf-8").splitlines()
    problems = tuple(
        _problem(line, f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    )
    if not problems:
        raise InvalidRequest(f"task: {path} holds no problems", field="task")
    return JsonLines(name=path.stem, problems=problems)


def _problem(line: str, where: str) -> Problem:
    try:
        entry: Any = msgspec.json.decode(line, type=Line)
    except msgspec.DecodeError as error:
        raise InvalidRequest(
            f'task: {where}: {error}; each line is {{"prompt": text, "answer": text or number}}',
            field="task",
        ) from error
    return Problem(question=entry.prompt, answer=str(entry.answer), key=entry.prompt)
