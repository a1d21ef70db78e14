"""Columns of streams say what an object of each would have said, whatever happens between steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

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
    {"stream_every": 3},
    {"stream_every": 3, "kv_policy": "recompute"},
    {"stream_every": 2**31 - 1},
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
                bench.keep(bench.scheduler.stop("r0", 3, "x"))
            case "more":
                add()
    for _ in range(200):
        if not bench.scheduler.has_work():
            break
        bench.step()
    return bench


def timeless(outputs: list[RequestOutput]) -> list[RequestOutput]:
    """Without how long they waited, which no two runs have alike."""
    return [structs.replace(output, queue_s=0.0) for output in outputs]


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
        assert encode(timeless(found.outputs[rid])) == encode(timeless(outputs)), rid


def test_streams_are_columns_from_their_second_output_on() -> None:
    bench = Recorded()
    bench.add(*(make_request(f"r{i}", range(5), max_new=6, stream=True) for i in range(5)))
    bench.run()
    # The first and the last output of each is an object.
    assert [len(rows.rids) for rows in bench.columns] == [5] * 4
    assert [rows.starts.tolist() for rows in bench.columns] == [[i] * 5 for i in range(1, 5)]


def test_a_stream_returns_so_many_tokens_at_once() -> None:
    bench = Recorded()
    for every in (1, 3):
        request = make_request(f"r{every}", range(5), max_new=9, stream=True, stream_every=every)
        bench.add(request)
    found = bench.run()
    sizes = {rid: [len(o.token_ids) for o in outputs] for rid, outputs in bench.outputs.items()}
    # The first comes at once, and the second sooner or later, so that streams take turns.
    assert sizes == {"r1": [1] * 9, "r3": [1, 2, 3, 3]}
    whole = Bench()
    whole.add(*(make_request(f"r{every}", range(5), max_new=9) for every in (1, 3)))
    for rid, output in whole.run().items():
        np.testing.assert_array_equal(found[rid].token_ids, output.token_ids)
        np.testing.assert_array_equal(found[rid].logprobs, output.logprobs)
    both = [rows.sizes.tolist() for rows in bench.columns if len(rows.rids) == 2]
    assert both == [[1, 2], [1, 3]]


def test_streams_that_began_together_take_turns() -> None:
    bench = Recorded(max_running=8, max_step_tokens=128)
    options = {"max_new": 40, "stream": True, "stream_every": 8}
    bench.add(*(make_request(f"r{i}", range(5), **options) for i in range(8)))
    bench.run()
    assert {len(rows.rids) for rows in bench.columns} == {1}
