"""The built-in tasks: largest of three, sorting, single-digit addition, letter counting."""

from __future__ import annotations

import random
from collections.abc import Sequence

from recipes.environments.few_shot import FewShot
from recipes.types import Problem

WORDS = (
    "apple banana orange tomato potato carrot pepper butter cheese coffee window garden bottle "
    "basket pencil letter summer winter spring autumn forest meadow valley island desert river "
    "mountain village castle bridge street market school teacher student doctor farmer sailor "
    "painter singer writer dancer soldier baker rabbit turtle spider monkey parrot pigeon donkey "
    "kitten puppy lizard beetle dolphin elephant giraffe leopard panther penguin sparrow squirrel "
    "balloon blanket cabinet candle carpet chimney compass curtain diamond drawer engine feather "
    "hammer kettle ladder lantern mirror needle pillow pocket ribbon saddle scissors shovel "
    "trumpet umbrella violin wagon whistle zipper"
)


def _numbers_key(numbers: Sequence[int]) -> str:
    return " ".join(str(number) for number in sorted(numbers))


def _largest(numbers: Sequence[int]) -> Problem:
    listed = ", ".join(str(number) for number in numbers)
    return Problem(
        question=f"Which is the largest number: {listed}?",
        answer=str(max(numbers)),
        key=_numbers_key(numbers),
    )


def _sorted(numbers: Sequence[int]) -> Problem:
    listed = ", ".join(str(number) for number in numbers)
    answer = ", ".join(str(number) for number in sorted(numbers))
    return Problem(question=f"Sort {listed}", answer=answer, key=_numbers_key(numbers))


def _sum(a: int, b: int) -> Problem:
    return Problem(question=f"{a} + {b} =", answer=str(a + b), key=_numbers_key((a, b)))


def _count(letter: str, word: str) -> Problem:
    return Problem(
        question=f"How many letters {letter} are in {word}?",
        answer=str(word.count(letter)),
        key=f"{letter} {word}",
    )


def _draw_count(rng: random.Random) -> Problem:
    word = rng.choice(WORDS.split())
    letters = word if rng.random() < 0.75 else "abcdefghijklmnopqrstuvwxyz"
    return _count(rng.choice(letters), word)


def largest() -> FewShot:
    """The largest of three different numbers from 1 to 99: 99 * 98 * 97 = 941,094 questions.

    The key is the sorted triple, so a held-out triple is not trained on in any order. The
    answers of the two examples stand in different places: a small model copies the place, and
    where all of its samples come from one place there is nothing to learn from.
    """
    return FewShot(
        name="largest",
        max_new_tokens=8,
        heldout_one_in=16,
        generate=lambda rng: _largest(rng.sample(range(1, 100), 3)),
        examples=(_largest((62, 14, 37)), _largest((9, 85, 51))),
    )


def sorting() -> FewShot:
    """Three different digits in ascending order: 720 questions, 120 keys."""
    return FewShot(
        name="sorting",
        max_new_tokens=12,
        heldout_one_in=4,
        generate=lambda rng: _sorted(rng.sample(range(10), 3)),
        examples=(_sorted((7, 2, 5)), _sorted((9, 4, 1))),
        instruction="Reply with the sorted numbers only.",
    )


def addition() -> FewShot:
    """Single-digit addition: 100 questions, 55 keys (a + b and b + a are one)."""
    return FewShot(
        name="addition",
        max_new_tokens=8,
        heldout_one_in=4,
        generate=lambda rng: _sum(rng.randrange(10), rng.randrange(10)),
        examples=(_sum(2, 5), _sum(8, 6)),
        instruction="Reply with the number only.",
    )


def letter_count() -> FewShot:
    """How often a letter occurs in a word: about 2,000 questions, three quarters of them > 0."""
    return FewShot(
        name="letter_count",
        max_new_tokens=8,
        heldout_one_in=4,
        generate=_draw_count,
        examples=(_count("e", "cheese"), _count("b", "rabbit"), _count("o", "tomato")),
        instruction="Reply with the number only.",
    )
