"""Columns of streams say what an object of each would have said, whatever happens between steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.protocol import RequestOutput, TokenRows, encode
from rollout.scheduler import emit
from tests.helpers.scheduling import Bench, make_request

STEPS = st.sampled_from(["step"] * 6 + ["update", "retract", "abort", "stop", "more"])
WANTS: list[dict[str, Any]] = [
    {},
    {},
    {"entropy": True},
    {"top_logprobs": 2},
    {"prompt_logprob_start": 0},
    {"kv_policy": "recompute"},
    {"stream": False},
]


class Recorded(Bench):
    """Keeps what each step returned as it came, too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.columns: list[TokenRows] = []

    def keep(self, outputs: Any) -> list[RequestOutput]:
        outputs = list(outputs)
        self.columns += [output for output in outputs if isinstance(output, TokenRows)]
        return super().keep(outputs)


def play(actions: list[str], wants: list[int]) -> Recorded:
    bench = Recorded(overlap=True, num_pages=64)
    version, added = 0, 0

    def add() -> None:
        nonlocal added
        for want in wants:
            fields = {"stream": True, **WANTS[want]}
            bench.add(make_request(f"r{added}", range(added % 3, 9), max_new=9, **fields))
            added += 1

    add()
    for action in actions:
        match action:
            case "step":
                bench.step()
            case "update":
                version += 1
                bench.set_version(version)
            case "retract":
                bench.keep(bench.scheduler.pause("retract"))
                bench.scheduler.resume()
            case "abort":
                bench.keep(bench.scheduler.abort(rid="r1"))
            case "stop":
                output = bench.scheduler.stop("r0", 3, "x")
                bench.keep([] if output is None else [output])
            case "more":
                add()
    for _ in range(200):
        if not bench.scheduler.has_work():
            break
        bench.step()
    return bench


@settings(max_examples=40, deadline=None)
@given(st.lists(STEPS, max_size=30), st.lists(st.integers(0, len(WANTS) - 1), min_size=1))
def test_columns_are_the_objects(actions: list[str], wants: list[int]) -> None:
    found = play(actions, wants)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(emit, "_is_plain", lambda sequence: False)
        expected = play(actions, wants)
    assert not expected.columns
    assert found.outputs.keys() == expected.outputs.keys()
    for rid, outputs in expected.outputs.items():
        assert encode(found.outputs[rid]) == encode(outputs), rid


def test_streams_are_columns_from_their_second_output_on() -> None:
    bench = Recorded()
    bench.add(*(make_request(f"r{i}", range(5), max_new=6, stream=True) for i in range(5)))
    bench.run()
    # The first and the last output of each is an object.
    assert [len(rows.rids) for rows in bench.columns] == [5] * 4
    assert [rows.starts.tolist() for rows in bench.columns] == [[i] * 5 for i in range(1, 5)]


def test_several_tokens_of_a_row() -> None:
    """A stream that is returned after more than one token, as behind a step that was not read."""
    bench = Recorded()
    bench.add(*(make_request(f"r{i}", range(5), max_new=9, stream=True) for i in range(2)))
    for _ in range(3):
        bench.step()
    table = bench.scheduler.running.table
    slot = int(bench.scheduler.running.slots()[0])
    rid = table.rids[slot]
    begin = int(table.emitted[slot]) - 1
    table.emitted[slot] = begin
    del bench.columns[:]
    bench.step()
    (rows,) = bench.columns
    row = rows.rids.index(rid)
    assert rows.sizes[row] == 2 and rows.sizes.sum() == 3
    place = int(rows.sizes[:row].sum())
    assert rows.starts[row] == begin - table.prompt_len[slot]
    np.testing.assert_array_equal(
        rows.token_ids[place : place + 2], table.tokens[slot, begin : begin + 2]
    )
    np.testing.assert_array_equal(
        rows.logprobs[place : place + 2], table.logprobs[slot, begin : begin + 2]
    )
