"""Which examples a step learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from recipes.data.chat_style import ChatStyle
from recipes.settings.sft_options import SftOptions
from recipes.tuning.example_stream import DrawnExamples, ShuffledExamples, make_batch, num_examples
from recipes.tuning.examples import Example, ExampleWriter
from tests.helpers.char_model import CharAddition, char_tokenizer


def example(*learnt: int) -> Example:
    return Example(
        token_ids=np.arange(len(learnt), dtype=np.int32), learnt=np.array(learnt, dtype=np.bool_)
    )


def test_every_epoch_has_every_example_once_in_an_order_of_its_own() -> None:
    rows = [example(0, *[1] * n) for n in range(1, 8)]
    stream = ShuffledExamples(rows, seed=3)
    epochs = [[stream.at(7 * epoch + i).num_learnt for i in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(1, 8)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert stream.at(3).num_learnt == epochs[0][3], "a position is the same when it comes again"
    assert [ShuffledExamples(rows, seed=4).at(i).num_learnt for i in range(7)] != epochs[0]


def test_made_problems_are_those_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ExampleWriter(tokenizer=char_tokenizer(), style=ChatStyle())
    stream = DrawnExamples(CharAddition(), writer, 0)
    ids = stream.at(5).token_ids
    assert ids.tolist() == DrawnExamples(CharAddition(), writer, 0).at(5).token_ids.tolist()
    question, _, answer = char_tokenizer().decode(ids).partition("=")
    assert int(answer) == sum(map(int, question.split("+")))


@pytest.mark.parametrize(
    "options,num_rows,num",
    [
        ({}, 100, 100),
        ({"epochs": 2.5}, 100, 250),
        ({"steps": 3, "batch_size": 8}, 100, 24),
        ({"batch_size": 8}, None, 400),
    ],
)
def test_the_length_of_a_run(options: Any, num_rows: int | None, num: int) -> None:
    assert num_examples(SftOptions(**options), num_rows) == num


def test_each_learnt_token_of_a_batch_weighs_the_same() -> None:
    batch = make_batch([example(0, 1, 0, 1), example(0, 0, 1)])
    assert batch.weights == pytest.approx([1 / 3, 1 / 3])
    assert batch.kept is not None and batch.learns.all()
    assert [k.tolist() for k in batch.kept] == [[True, False, True], [True]]
    assert [len(t.prompt_ids) for t in batch.trajectories] == [1, 2]
