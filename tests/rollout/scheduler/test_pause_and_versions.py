"""Pausing in three modes, and new weights while requests run."""

from __future__ import annotations

import pytest

from engine.protocol import VersionSpan
from tests.helpers.scheduling import Bench, check_output, make_request


def started(steps: int = 4, **config: object) -> tuple[Bench, list]:
    bench = Bench(max_running=2, **config)
    requests = [make_request(str(i), range(i, i + 9), max_new=12) for i in range(3)]
    bench.add(*requests)
    for _ in range(steps):
        bench.step()
    return bench, requests


@pytest.mark.parametrize("mode", ["keep", "retract"])
@pytest.mark.parametrize("overlap", [True, False])
def test_pause_and_resume_change_nothing(mode: str, overlap: bool):
    bench, requests = started(overlap=overlap)
    for _ in range(2):
        assert bench.scheduler.pause(mode) == []
    assert bench.scheduler.plan() is None
    assert bench.scheduler.has_work() and bench.scheduler.stats().paused
    late = make_request("late", range(30, 40))
    bench.add(late)
    bench.step()
    assert bench.scheduler.plan() is None
    bench.scheduler.resume()
    bench.scheduler.resume()
    outputs = bench.run()
    for request in [*requests, late]:
        check_output(request, outputs[request.rid])


def test_retract_frees_the_kv():
    bench, _ = started()
    bench.scheduler.pause("retract")
    stats = bench.scheduler.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 3)
    bench.scheduler.flush_cache()
    assert bench.scheduler.stats().free_pages == 256
    bench.scheduler.resume()
    outputs = bench.run()
    assert [outputs[rid].num_retractions for rid in "012"] == [1, 1, 0]


def test_abort_ends_everything_with_what_there_is():
    bench, _ = started()
    outputs = bench.keep(bench.scheduler.pause("abort"))
    assert [len(output.token_ids) for output in outputs] == [4, 4, 0]
    assert {output.finish.type for output in outputs} == {"abort"}
    assert not bench.scheduler.has_work()
    bench.check_empty()


def test_abort_works_while_paused():
    bench, _ = started()
    bench.scheduler.pause("keep")
    assert [output.rid for output in bench.keep(bench.scheduler.abort("1"))] == ["1"]
    bench.scheduler.resume()
    assert set(bench.run()) == set("012")


@pytest.mark.parametrize("overlap", [True, False])
def test_kept_requests_go_on_and_their_spans_show_both_versions(overlap: bool):
    bench, requests = started(overlap=overlap)
    bench.set_version(1)
    outputs = bench.run()
    for request in requests:
        check_output(request, outputs[request.rid])
    assert outputs["0"].spans == [VersionSpan(0, 0, 4), VersionSpan(1, 4, 12)]
    assert outputs["2"].spans == [VersionSpan(1, 0, 12)]


def test_streams_carry_the_spans_of_their_own_tokens():
    bench = Bench()
    bench.add(make_request("a", range(5), max_new=4, stream=True))
    bench.step()
    bench.step()
    bench.set_version(3)
    bench.run()
    spans = [output.spans for output in bench.outputs["a"]]
    assert spans == [
        [VersionSpan(0, 0, 1)],
        [VersionSpan(0, 1, 2)],
        [VersionSpan(3, 2, 3)],
        [VersionSpan(3, 3, 4)],
    ]


def test_new_version_matches_no_old_prefix():
    bench = Bench()
    bench.add(make_request("a", range(20)))
    bench.run()
    bench.set_version(1)
    assert bench.scheduler.stats().cached_pages == 0
    bench.add(make_request("b", range(20)))
    assert bench.run()["b"].cached_tokens == 0
    bench.add(make_request("c", range(20)))
    assert bench.run()["c"].cached_tokens == 19


def test_mixed_kv_is_never_shared():
    bench = Bench(page_size=4, max_chunk_tokens=8)
    decoding, prefilling = make_request("d", range(9), max_new=9), make_request("p", range(40, 90))
    bench.add(decoding, prefilling)
    bench.step()
    bench.step()
    bench.set_version(1)
    bench.run()
    assert bench.scheduler.stats().cached_pages == 0
    follower = make_request("f", range(40, 90))
    bench.add(follower)
    output = bench.run()["f"]
    assert output.cached_tokens == 0
    check_output(follower, output)


def test_retracted_across_an_update_recomputes_and_shares_again():
    bench, requests = started(steps=5)
    bench.scheduler.pause("retract")
    bench.set_version(1)
    bench.scheduler.resume()
    outputs = bench.run()
    for request in requests:
        check_output(request, outputs[request.rid])
    assert outputs["0"].spans == [VersionSpan(0, 0, 5), VersionSpan(1, 5, 12)]
    assert bench.scheduler.stats().cached_pages > 0


def test_update_to_the_same_version_still_drops_the_cache():
    bench, _ = started()
    bench.set_version(0)
    assert bench.scheduler.stats().cached_pages == 0
    outputs = bench.run()
    assert outputs["0"].spans == [VersionSpan(0, 0, 12)]


def test_aborting_all_leaves_nothing_cached_and_aborting_one_does():
    bench, _ = started()
    bench.keep(bench.scheduler.abort(rid="0"))
    assert bench.scheduler.stats().cached_pages > 0
    bench, requests = started()
    outputs = bench.keep(bench.scheduler.abort(all=True))
    assert [output.rid for output in outputs] == ["0", "1", "2"]
    assert [output.kv_spans[-1].end if output.kv_spans else 0 for output in outputs] == [12, 12, 0]
    bench.check_empty()
    bench.add(requests[0])
    bench.outputs.clear()
    check_output(requests[0], bench.run()["0"])
