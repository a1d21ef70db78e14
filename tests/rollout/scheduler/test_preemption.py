"""What happens when pages run out."""

from __future__ import annotations

import pytest

from rollout.scheduler.planning.page_reserve import FIRST_RATIO, LEAST_RATIO, PageReserve
from tests.helpers.scheduling import VOCAB, Bench, check_output, expected, make_request


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_retracted_requests_come_out_the_same(prefix_cache: bool, overlap: bool):
    bench = Bench(
        num_pages=14, page_size=4, prefix_cache=prefix_cache, overlap=overlap, max_running=6
    )
    bench.scheduler._reserve._ratio = 0.0
    requests = [
        make_request(str(i), range(10 * i, 10 * i + 5), max_new=24, entropy=i % 2 == 0)
        for i in range(6)
    ]
    bench.add(*requests)
    outputs = bench.run()
    for request in requests:
        check_output(request, outputs[request.rid])
    retractions = sum(output.num_retractions for output in outputs.values())
    assert retractions == bench.scheduler.stats().num_retractions > 0
    assert all(output.cached_tokens == 0 for output in outputs.values())


@pytest.mark.parametrize("overlap", [True, False])
def test_the_minimum_holds_for_retracted_requests(overlap: bool):
    bench = Bench(num_pages=14, page_size=4, overlap=overlap, max_running=6)
    bench.scheduler._reserve._ratio = 0.0
    stops = list(range(0, VOCAB, 2))
    requests = [
        make_request(
            str(i), range(10 * i, 10 * i + 5), max_new=24, min_new_tokens=16, stop_ids=stops
        )
        for i in range(6)
    ]
    bench.add(*requests)
    outputs = bench.run()
    assert sum(output.num_retractions for output in outputs.values()) > 0
    for request in requests:
        check_output(request, outputs[request.rid])
        ids = outputs[request.rid].token_ids.tolist()
        assert not set(ids[:16]) & set(stops)
        assert outputs[request.rid].finish.type == "stop" and len(ids) > 16


def test_victim_is_the_low_priority_one():
    bench = Bench(num_pages=8, page_size=4)
    bench.scheduler._reserve._ratio = 0.0
    bench.add(
        make_request("low", range(4), max_new=25),
        make_request("high", range(10, 14), max_new=25, priority=3),
    )
    outputs = bench.run()
    assert outputs["low"].num_retractions > 0
    assert outputs["high"].num_retractions == 0


def test_lone_request_that_fills_the_pool_ends_with_an_error():
    bench = Bench(num_pages=5, page_size=4)
    request = make_request("a", range(8), max_new=50)
    bench.add(request)
    output = bench.run()["a"]
    assert (output.finish.type, output.finish.error) == ("abort", "OutOfMemory")
    # 20 tokens have KV, and the last of them gave one token more.
    assert output.token_ids.tolist() == expected(request)[0][: 20 + 1 - 8]


def test_request_that_just_fits_the_pool_ends_well():
    bench = Bench(num_pages=5, page_size=4)
    request = make_request("a", range(8), max_new=13)
    bench.add(request, make_request("b", range(30, 38), max_new=13))
    outputs = bench.run()
    check_output(request, outputs["a"])
    assert outputs["b"].finish.type == "length"


def test_reserve_makes_retraction_rare():
    requests = [make_request(str(i), range(i, i + 8), max_new=24) for i in range(8)]
    counts = []
    for ratio in (0.0, 1.0):
        bench = Bench(num_pages=24, page_size=4)
        bench.scheduler._reserve._ratio = ratio
        bench.add(*requests)
        bench.run()
        counts.append(bench.scheduler.stats().num_retractions)
    assert counts[1] == 0 < counts[0]


def test_reserve_ratio_falls_and_rises():
    reserve = PageReserve(4)
    for _ in range(2000):
        reserve.decay()
    assert reserve._ratio == LEAST_RATIO < FIRST_RATIO
    for _ in range(20):
        reserve.retracted()
    assert reserve._ratio == 1.0


def test_prompts_stuck_for_pages_make_way_for_one(monkeypatch: pytest.MonkeyPatch):
    bench = Bench(num_pages=10, page_size=4, max_chunk_tokens=8, max_step_tokens=16)
    first = make_request("a", range(40), max_new=1)
    second = make_request("b", range(50, 88), max_new=1)
    bench.add(first)
    bench.step()
    # Past the admission check, as if its pages had been there a moment ago.
    monkeypatch.setattr(bench.scheduler._reserve, "pages_for", lambda table, slots: -100)
    bench.add(second)
    outputs = bench.run()
    check_output(first, outputs["a"])
    check_output(second, outputs["b"])
    assert bench.scheduler.stats().num_retractions > 0
