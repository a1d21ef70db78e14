"""What one request asks for widens no table that the others pay for."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import InvalidRequest
from rollout.scheduler.table import STOP_COLUMNS
from tests.helpers.scheduling import Bench, check_output, expected, make_request


@pytest.mark.parametrize("count", [1, STOP_COLUMNS, STOP_COLUMNS + 1, 90])
def test_any_number_of_stop_ids_stops(count: int):
    tokens, _ = expected(make_request("a", range(5), max_new=12))
    others = [token for token in range(97) if token not in tokens][: count - 1]
    stops = [*others, tokens[4]]
    first = tokens.index(tokens[4])
    bench = Bench()
    bench.add(make_request("a", range(5), max_new=12, stop_ids=stops))
    bench.add(*(make_request(f"b{i}", range(5), max_new=12, seed=i) for i in range(5)))
    outputs = bench.run()
    assert outputs["a"].token_ids.tolist() == tokens[: first + 1]
    assert outputs["a"].finish is not None and outputs["a"].finish.matched == tokens[4]
    for i in range(5):
        check_output(make_request(f"b{i}", range(5), max_new=12, seed=i), outputs[f"b{i}"])


def test_the_table_is_as_wide_after_a_request_with_many_stop_ids_as_before():
    bench = Bench(context_length=64)
    table = bench.scheduler._running.table
    shape = table.stop_ids.shape
    bench.add(make_request("a", [1], max_new=3, stop_ids=list(range(97)) * 21))
    bench.add(make_request("b", [1], max_new=3))
    bench.step()
    assert table.stop_ids.shape == shape
    bench.run()
    assert table.stop_ids.shape == shape and not table.many_stops


def test_a_slot_forgets_the_stop_ids_of_its_former_tenant():
    bench = Bench(max_running=1)
    bench.add(make_request("a", [1], max_new=1, stop_ids=list(range(97))))
    bench.run()
    request = make_request("b", range(5), max_new=9)
    bench.add(request)
    check_output(request, bench.run()["b"])


@pytest.mark.parametrize(
    "field,value",
    [
        ("priority", 2**63),
        ("priority", -(2**63) - 1),
        ("temperature", 1e39),
        ("repetition_penalty", 1e39),
        ("frequency_penalty", float("nan")),
        ("top_k", 2**63),
        ("logit_bias", {1: 1e39}),
    ],
)
def test_a_number_no_table_holds_is_refused_before_anything_is_changed(field, value):
    bench = Bench()
    bench.add(make_request("a", range(5), max_new=2))
    with pytest.raises(InvalidRequest) as caught:
        bench.add(make_request("b", range(5), max_new=2, **{field: value}))
    assert caught.value.field == field
    outputs = bench.run()
    assert set(outputs) == {"a"}


@pytest.mark.parametrize("minimum", [2**31 - 3, 2**31 - 1])
def test_a_minimum_beyond_the_context_runs_to_its_end(minimum: int):
    bench = Bench(context_length=16)
    bench.add(make_request("a", range(5), max_new=minimum, min_new_tokens=minimum, stop_ids=[3, 4]))
    output = bench.run()["a"]
    assert len(output.token_ids) == 11 and output.finish is not None
    assert output.finish.type == "length"
    assert output.token_ids.dtype == np.int32
