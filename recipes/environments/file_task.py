"""Problems from a data set of one's own, verified by math-verify."""

from __future__ import annotations

import dataclasses
import logging
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import InvalidRequest
from recipes.data.column_map import map_columns
from recipes.data.data_options import DataOptions
from recipes.data.problem_table import (
    FindLayout,
    ProblemTable,
    PromptLayout,
    read_problems,
)
from recipes.data.rows import Place, Row
from recipes.data.source import Source, choose_split, open_source
from recipes.environments.base import Split
from recipes.rewards.graders.worker import GraderSpec
from recipes.rewards.math import MATH, math_match
from recipes.types import Message, Problem

logger = logging.getLogger(__name__)

DEFAULT_ONE_IN = 8

Indices = np.ndarray[Any, np.dtype[np.int64]]
Chosen = Mapping[Split, tuple[ProblemTable, Indices]]
"""The table of each split, and the indices of its problems there."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FileTask:
    """The problems of a file or folder; an `Environment` with splits of its own.

    path: the data set of training. splits: see `Chosen`; both hold one table where prompts are
    held out by a hash. heldout_one_in: one prompt in so many is, 0 where the held-out ones are a
    data set of their own.
    """

    name: str
    path: Path
    splits: Chosen
    max_new_tokens: int = 256
    heldout_one_in: int = DEFAULT_ONE_IN

    def count(self, split: Split) -> int:
        """See `OwnSplits`."""
        return len(self.splits[split][1])

    def at(self, split: Split, index: int) -> Problem:
        """See `OwnSplits`."""
        table, indices = self.splits[split]
        return table.problem(int(indices[index]))

    def place(self, split: Split, index: int) -> Place:
        """Where a problem's row stands."""
        table, indices = self.splits[split]
        return table.place(int(indices[index]))

    def num_different(self, split: Split) -> int:
        """Problems of a split, those with equal prompts counted once."""
        table, indices = self.splits[split]
        return len({table.digest(index) for index in indices.tolist()})

    def without(self, left_out: Mapping[Split, Iterable[int]]) -> FileTask:
        """The task without some problems of each split, by the index there."""
        splits: dict[Split, tuple[ProblemTable, Indices]] = {}
        for split, (table, indices) in self.splits.items():
            gone = np.array(list(left_out.get(split, ())), dtype=np.int64)
            splits[split] = (table, np.delete(indices, gone))
        return dataclasses.replace(self, splits=splits)

    def draw(self, rng: random.Random) -> Problem:
        """Any problem of either split, with replacement."""
        index = rng.randrange(self.count("train") + self.count("heldout"))
        if index < self.count("train"):
            return self.at("train", index)
        return self.at("heldout", index - self.count("train"))

    def messages(self, problem: Problem) -> list[Message]:
        """The conversation of the row, or its text as the one user turn."""
        return list(problem.chat) or [{"role": "user", "content": problem.question}]

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


def load_task(
    path: Path, options: DataOptions | None = None, *, needs_answer: bool = True
) -> FileTask:
    """Read and check every row of a data set of prompts and answers. needs_answer: whether the
    reward compares with one.

    Raises InvalidRequest naming `task` and the first row that is wrong, or the option that names
    what is not there."""
    given = options or DataOptions()

    def find(row: Row, field: str) -> PromptLayout:
        columns = map_columns(row, given, needs_answer=needs_answer, field=field)
        return PromptLayout(columns=columns)

    return load_rows(path, find, train_split=given.train_split, heldout=given.heldout)


def load_rows(
    path: Path, find: FindLayout, *, train_split: str | None, heldout: str | None
) -> FileTask:
    """`load_task` of rows of any layout. train_split, heldout: see `DataOptions`."""
    source = open_source(path, field="task")
    split = choose_split(source, train_split, field="task", flag="train_split")
    table = read_problems(source, split, find, field="task")
    one_in = _one_in(heldout)
    if one_in is not None:
        splits = _by_hash(table, one_in)
    else:
        assert heldout is not None
        other, name = _heldout_source(source, split, heldout)
        splits = _apart(table, read_problems(other, name, find, field="heldout"))
    return FileTask(name=source.name, path=path, splits=splits, heldout_one_in=one_in or 0)


def _one_in(heldout: str | None) -> int | None:
    """N of 1/N; None if something else is held out than a share."""
    if heldout is None:
        return DEFAULT_ONE_IN
    if not re.fullmatch(r"\s*(\d+/\d+|\d*\.\d+|\d+)\s*", heldout) or Path(heldout).exists():
        return None
    share = Fraction(heldout) if not re.search(r"/\s*0+\s*$", heldout) else Fraction(0)
    if share.numerator != 1 or share.denominator < 2:
        raise InvalidRequest(
            f"heldout: {heldout} is no share of one in N prompts; write 1/N, such as 1/20",
            field="heldout",
        )
    return share.denominator


def _heldout_source(source: Source, train: str, heldout: str) -> tuple[Source, str]:
    """Where the held-out problems lie: a split of the same folder, or a data set beside it."""
    if source.is_split and heldout in source.splits:
        if heldout == train:
            raise InvalidRequest(
                f"heldout: {heldout} is the split that is trained on; name another",
                field="heldout",
            )
        return source, heldout
    if not Path(heldout).exists():
        splits = ", ".join(source.splits) if source.is_split else "none"
        raise InvalidRequest(
            f"heldout: {heldout!r} is no split of {source.path} (it has {splits}), no file or "
            "folder, and no share such as 1/20",
            field="heldout",
        )
    other = open_source(Path(heldout), field="heldout")
    if len(other.splits) > 1:
        raise InvalidRequest(
            f"heldout: {other.path} has the splits {', '.join(other.splits)}; give the file or "
            "folder of one of them",
            field="heldout",
        )
    return other, next(iter(other.splits))


def _by_hash(table: ProblemTable, one_in: int) -> Chosen:
    is_heldout = np.array([table.digest(index) % one_in == 0 for index in range(len(table))])
    return {
        "train": (table, np.flatnonzero(~is_heldout)),
        "heldout": (table, np.flatnonzero(is_heldout)),
    }


def _apart(train: ProblemTable, heldout: ProblemTable) -> Chosen:
    """Prompts that are held out are not trained on, whichever data set has them too."""
    held = {heldout.digest(index) for index in range(len(heldout))}
    kept = np.flatnonzero([train.digest(index) not in held for index in range(len(train))])
    if len(kept) < len(train):
        logger.warning(
            "task: %d of %d rows have prompts that are held out; not trained on",
            len(train) - len(kept),
            len(train),
        )
    return {"train": (train, kept), "heldout": (heldout, np.arange(len(heldout)))}
