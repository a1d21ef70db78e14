"""What an update does to running and waiting requests, as their `kv_policy` says."""

from __future__ import annotations

import pytest

from engine.errors import InvalidRequest
from engine.protocol import VersionSpan
from tests.helpers.scheduling import VOCAB, Bench, check_output, check_spans, make_request

POLICIES = ["keep", "recompute", "fresh"]


def run_across_an_update(policy: str, *, overlap: bool = False, **fields: object):
    """Nine prompt tokens and twelve outputs, an update after the fourth."""
    bench = Bench(overlap=overlap)
    request = make_request("a", range(9), max_new=12, kv_policy=policy, **fields)
    bench.add(request)
    for _ in range(4):
        bench.step()
    bench.set_version(1)
    output = bench.run()["a"]
    bench.check_kv_spans(request, output)
    return bench, request, output


@pytest.mark.parametrize("overlap", [True, False])
def test_keep_goes_on_with_stale_kv_and_says_so(overlap: bool):
    _, request, output = run_across_an_update("keep", overlap=overlap)
    check_output(request, output)
    assert output.spans == [VersionSpan(0, 0, 4), VersionSpan(1, 4, 12)]
    assert output.kv_spans == [VersionSpan(0, 0, 12), VersionSpan(1, 12, 20)]
    assert (output.num_retractions, output.num_restarts) == (0, 0)


def test_recompute_keeps_the_tokens_and_has_kv_of_one_version():
    bench, request, output = run_across_an_update("recompute")
    check_output(request, output)
    assert output.spans == [VersionSpan(0, 0, 4), VersionSpan(1, 4, 12)]
    assert output.kv_spans == [VersionSpan(1, 0, 20)]
    assert (output.num_retractions, output.num_restarts) == (1, 0)
    assert bench.scheduler.stats().cached_pages > 0, "its KV is pure and may be shared"


def test_fresh_starts_again_and_one_version_samples_all():
    _, request, output = run_across_an_update("fresh")
    check_output(request, output)
    assert output.spans == [VersionSpan(1, 0, 12)]
    assert output.kv_spans == [VersionSpan(1, 0, 20)]
    assert output.num_restarts == 1


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("overlap", [True, False])
def test_the_minimum_holds_across_an_update(policy: str, overlap: bool):
    stops = list(range(0, VOCAB, 2))
    _, request, output = run_across_an_update(
        policy, overlap=overlap, min_new_tokens=8, stop_ids=stops
    )
    check_output(request, output)
    assert not set(output.token_ids[:8].tolist()) & set(stops)
    assert output.finish.type == "stop" and len(output.token_ids) > 8


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("overlap", [True, False])
def test_prompt_and_top_logprobs_come_once(policy: str, overlap: bool):
    _, request, output = run_across_an_update(
        policy, overlap=overlap, prompt_logprob_start=0, top_logprobs=2
    )
    check_output(request, output)
    assert output.top is not None and output.top.ids.shape == (12, 2)


def test_a_stream_that_would_start_again_ends_with_a_typed_error():
    bench = Bench()
    streams = {p: make_request(p, range(9), stream=True, kv_policy=p) for p in POLICIES}
    bench.add(*streams.values())
    bench.step()
    bench.step()
    [ended] = bench.set_version(1)
    assert (ended.rid, ended.finish.type, ended.finish.error) == (
        "fresh",
        "abort",
        "WeightUpdateError",
    )
    assert "streamed" in ended.finish.message
    outputs = bench.run()
    assert len(outputs["fresh"].token_ids) == 2
    for policy in ("keep", "recompute"):
        check_output(streams[policy], outputs[policy])


def test_a_stream_that_has_returned_nothing_starts_again():
    bench = Bench(max_step_tokens=4)
    request = make_request("a", range(9), stream=True, kv_policy="fresh")
    bench.add(request)
    bench.step()
    assert bench.set_version(1) == []
    output = bench.run()["a"]
    check_output(request, output)
    assert output.num_restarts == 0, "it had nothing to lose"
    assert output.kv_spans == [VersionSpan(1, 0, 16)]


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_hold_for_requests_retracted_before_the_update(policy: str):
    bench = Bench()
    request = make_request("a", range(9), max_new=12, kv_policy=policy)
    bench.add(request)
    for _ in range(4):
        bench.step()
    bench.scheduler.pause("retract")
    bench.set_version(1)
    bench.set_version(2)
    bench.scheduler.resume()
    output = bench.run()["a"]
    check_output(request, output)
    bench.check_kv_spans(request, output)
    assert output.kv_spans == [VersionSpan(2, 0, 20)]
    assert output.num_restarts == (1 if policy == "fresh" else 0)
    first = [] if policy == "fresh" else [VersionSpan(0, 0, 4)]
    assert output.spans[: len(first)] == first
    assert output.spans[-1].version == 2


def test_a_restarted_request_goes_before_newer_ones():
    bench = Bench(max_running=1)
    old = make_request("old", range(9), max_new=6, kv_policy="fresh")
    bench.add(old, make_request("new", range(20, 29)))
    bench.step()
    bench.set_version(1)
    assert [s.request.rid for s in bench.scheduler._queue] == ["old", "new"]
    bench.step()
    assert bench.scheduler._running.sequences()[0].request.rid == "old"
    check_output(old, bench.run()["old"])


def test_updates_while_paused_apply_to_what_is_kept():
    bench = Bench()
    requests = [make_request(p, range(9), max_new=12, kv_policy=p) for p in POLICIES]
    bench.add(*requests)
    for _ in range(4):
        bench.step()
    bench.scheduler.pause("keep")
    for version in (1, 2, 3):
        bench.set_version(version)
    assert bench.scheduler.plan() is None
    bench.keep(bench.scheduler.abort(rid="recompute"))
    bench.scheduler.resume()
    outputs = bench.run()
    assert outputs["keep"].kv_spans == [VersionSpan(0, 0, 12), VersionSpan(3, 12, 20)]
    assert outputs["fresh"].spans == [VersionSpan(3, 0, 12)]
    assert outputs["recompute"].kv_spans == [], "its KV was dropped when the abort came"
    check_spans(outputs["recompute"])


def test_an_unknown_policy_is_refused():
    with pytest.raises(InvalidRequest, match="fresh, keep, recompute") as refusal:
        Bench().add(make_request("a", [1], kv_policy="maybe"))
    assert refusal.value.field == "kv_policy"
