"""Routes: read by the step behind the one that a sequence left its pages in, once, and returned
with its last output."""

from __future__ import annotations

import numpy as np
import pytest

from engine.config import SpeculativeConfig
from engine.errors import InvalidRequest
from engine.protocol import ErrorInfo, Request
from tests.helpers.copied_bench import CopiedBench
from tests.helpers.mock_executor import prefix_hashes
from tests.helpers.mock_routes import EXPERTS, expected_routes
from tests.helpers.scheduling import Bench, expected, make_request


def routed(rid: str, prompt: range | list[int], **fields: object) -> Request:
    return make_request(rid, prompt, return_routed_experts=True, **fields)


def check(bench: Bench, *requests: Request) -> None:
    outputs = bench.run()
    for request in requests:
        bench.check_routes(request, outputs[request.rid])


def crowded(bench: Bench) -> Bench:
    """It lets in more sequences than there are pages for."""
    for copy in bench.scheduler.copies:
        copy._reserve._ratio = 0.0
    return bench


def num_read(bench: Bench) -> int:
    return sum(read.count for plan in bench.plans for read in plan.route_reads)


@pytest.mark.parametrize("overlap", [False, True])
def test_nothing_waits_for_another_step(overlap: bool) -> None:
    bench, request = Bench(overlap=overlap), routed("a", range(9), max_new=3)
    bench.add(request)
    check(bench, request)
    assert bench.executor.num_rowless == 1 and len(bench.plans[-1].slots) == 0
    assert bench.scheduler.stats().num_steps == len(bench.plans) - 1
    assert num_read(bench) == 11


def test_what_others_compute_meanwhile_reads_it_too() -> None:
    bench = Bench()
    first, second = routed("a", range(9), max_new=3), make_request("b", range(5), max_new=9)
    bench.add(first, second)
    check(bench, first, second)
    assert bench.executor.num_rowless == 0


def test_who_does_not_ask_costs_no_step() -> None:
    bench = crowded(Bench(num_pages=14))
    bench.add(*(make_request(f"r{i}", range(i, i + 9), max_new=20) for i in range(6)))
    bench.run()
    assert bench.scheduler.stats().num_retractions > 0
    assert num_read(bench) == bench.executor.num_rowless == 0


@pytest.mark.parametrize("build", [Bench, CopiedBench])
@pytest.mark.parametrize("overlap", [False, True])
def test_each_position_is_read_once_however_often_its_sequence_went(
    overlap: bool, build: type[Bench]
) -> None:
    bench = crowded(build(num_pages=14, overlap=overlap))
    asked = [routed(f"r{i}", range(i, i + 9), max_new=20) for i in range(12)]
    bench.add(*asked)
    check(bench, *asked)
    assert bench.scheduler.stats().num_retractions > 0
    reads = [r for plan in bench.plans for copy in plan.copies() for r in copy.route_reads]
    assert sum(read.count for read in reads) == 12 * 28


def test_samples_share_the_routes_of_their_prompt() -> None:
    bench = Bench(overlap=True)
    asked = [routed(f"r{i}", range(10), group="g", seed=i, max_new=5 + i) for i in range(4)]
    bench.add(*asked)
    check(bench, *asked)
    assert bench.executor.num_copies == 3
    again = routed("again", range(10), routed_experts_start_len=8)
    bench.add(again)
    outputs = bench.run()
    assert outputs["again"].cached_tokens == 9
    bench.check_routes(again, outputs["again"])


@pytest.mark.parametrize("pace", [0, 1, 2])
def test_rejected_drafts_leave_no_routes(pace: int) -> None:
    drafts = SpeculativeConfig(method="ngram", draft_tokens=3, pace="counts")
    bench = Bench(speculative=drafts, overlap=True)
    bench.executor.accepts = lambda seed, place: (seed + place) % 3 < pace
    asked = [routed(f"r{i}", [1, 2, 3] * 5, seed=i, max_new=30) for i in range(3)]
    bench.add(*asked)
    check(bench, *asked)
    assert bench.executor.num_drafted > 0


@pytest.mark.parametrize("kv_policy", ["keep", "recompute", "fresh"])
def test_a_position_keeps_the_route_of_the_weights_that_sampled_from_it(kv_policy: str) -> None:
    bench = Bench()
    request = routed("a", range(6), max_new=12, kv_policy=kv_policy)
    bench.add(request)
    for version in (1, 2):
        for _ in range(4):
            bench.step()
        bench.set_version(version)
    output = bench.run()["a"]
    bench.check_routes(request, output)
    hashes = prefix_hashes([*range(6), *output.token_ids.tolist()])[:-1]
    versions = [span.version for span in output.spans for _ in range(span.start, span.end)]
    sampled = expected_routes(hashes[5:], versions)
    np.testing.assert_array_equal(output.routed_experts[5:], sampled)
    assert (set(versions) == {2}) == (kv_policy == "fresh")


def test_an_end_before_everything_was_computed_leaves_absent_ones() -> None:
    bench = Bench(max_running=1, max_step_tokens=4)
    first, second = routed("first", range(9)), routed("second", range(5))
    bench.add(first, second)
    bench.step()
    bench.keep(bench.scheduler.abort(rids=["first", "second"]))
    outputs = bench.run()
    for request, known in ((first, 4), (second, 0)):
        routes = outputs[request.rid].routed_experts
        hashes = prefix_hashes(request.prompt_ids.tolist())
        np.testing.assert_array_equal(routes[:known], expected_routes(hashes[:known], [0] * known))
        assert (routes[known:, EXPERTS.layers] == 255).all() and not routes[:, 0].any()
        assert len(routes) == len(request.prompt_ids) - 1


@pytest.mark.parametrize("mode", ["abort", "retract", "keep"])
def test_a_pause_holds_back_no_output(mode: str) -> None:
    bench, request = Bench(), routed("a", range(9))
    bench.add(request)
    for _ in range(4):
        bench.step()
    bench.keep(bench.scheduler.pause(mode))
    if mode != "abort":
        bench.keep(bench.scheduler.abort(rid="a"))
    assert not bench.outputs and bench.scheduler.has_work()
    check(bench, request)
    assert bench.scheduler.paused


def test_an_id_is_taken_until_its_output_is_there() -> None:
    bench = Bench()
    bench.add(routed("a", range(9)))
    for _ in range(4):
        bench.step()
    assert bench.scheduler.abort(rid="a") == []
    with pytest.raises(InvalidRequest, match="already in use"):
        bench.scheduler.add(make_request("a", range(3)))
    assert bench.scheduler.stop("a", 1, "x") == []
    bench.run()
    bench.scheduler.add(make_request("a", range(3)))


def test_a_step_that_fails_takes_them_along() -> None:
    bench = Bench()
    bench.add(routed("a", range(9)), routed("b", range(4)))
    for _ in range(4):
        bench.step()
    bench.scheduler.abort(rid="a")
    found = bench.scheduler.fail_all(ErrorInfo(kind="OutOfMemory", message="gone"))
    assert sorted(output.rid for output in found) == ["a", "b"]
    assert all(o.finish.error == "OutOfMemory" and o.routed_experts is None for o in found)
    assert not bench.scheduler.has_work() and not bench.scheduler.wants_reads
    bench.check_empty()


def test_an_output_that_is_over_when_it_comes_is_computed_for_its_routes() -> None:
    bench, request = Bench(), routed("a", range(9), max_new=4)
    given = np.array(expected(request)[0], np.int32)
    over = routed("b", range(9), max_new=4, seed=request.seed, output_ids=given)
    bench.add(over)
    output = bench.run()["b"]
    assert output.finish.type == "length" and len(output.routed_experts) == 12
    bench.check_routes(over, output)


BAD = [
    ({"routed_experts_start_len": 10}, "routed_experts_start_len"),
    ({"routed_experts_start_len": -1}, "routed_experts_start_len"),
    ({"task": "embed", "max_new": 0}, "return_routed_experts"),
]


@pytest.mark.parametrize(("fields", "field"), BAD)
def test_what_is_refused(fields: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Bench().add(routed("a", range(9), **fields))
    assert caught.value.field == field
