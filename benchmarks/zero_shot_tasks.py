"""Tasks in words for models that saw no example of them, as files for `--task`.

    python benchmarks/zero_shot_tasks.py numerals > numerals.jsonl
    python recipes/grpo.py --task numerals.jsonl --minutes 10

Questions spell every number out and answers are digits, so that no token of an answer is in its
question: a reply cannot be right by copying. The default model has some of them right and most
wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

Row = dict[str, Any]

ONES = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
)
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def spelled(number: int) -> str:
    """English for a number from 0 to 999, e.g. "three hundred and forty-two"."""
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{ONES[hundreds]} hundred" + (f" and {spelled(rest)}" if rest else "")


def numerals() -> list[Row]:
    """Numbers from 20 to 499, to be written in digits."""
    return [
        {
            "prompt": f"Which number is {spelled(number)}? Reply with the number in digits only.",
            "answer": number,
        }
        for number in range(20, 500)
    ]


def word_sums() -> list[Row]:
    """Sums of two numbers from 0 to 12, each asked in two ways."""
    return [
        {
            "prompt": f"{asked} {spelled(a)} plus {spelled(b)}? "
            "Reply with the number in digits only.",
            "answer": a + b,
        }
        for asked in ("What is", "How much is")
        for a in range(13)
        for b in range(13)
    ]


TASKS: Mapping[str, Callable[[], list[Row]]] = MappingProxyType(
    {"numerals": numerals, "word_sums": word_sums}
)


def main(argv: list[str]) -> int:
    """Write the task called by the one argument to stdout."""
    if len(argv) != 1 or argv[0] not in TASKS:
        sys.stderr.write(f"give one of {', '.join(TASKS)}\n")
        return 2
    for row in TASKS[argv[0]]():
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
