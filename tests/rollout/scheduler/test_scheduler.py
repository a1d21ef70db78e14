"""The scheduler's surface: requests in, outputs out, one behaviour a test."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import InvalidRequest, QueueFull, SlipstreamError
from engine.protocol import ErrorInfo, StepResult
from rollout.requests.sample_ids import sample_id
from tests.helpers.mock_executor import top_of
from tests.helpers.scheduling import (
    Bench,
    check_entropies,
    check_output,
    expected,
    joined,
    make_request,
)


def test_one_request_alone():
    bench, request = Bench(), make_request("a", range(10), max_new=6)
    bench.add(request)
    output = bench.run()["a"]
    check_output(request, output)
    assert output.finish.type == "length" and output.finish.length == 6
    assert (output.prompt_tokens, output.cached_tokens, output.num_retractions) == (10, 0, 0)
    assert bench.executor.num_computed == 10 + 5
    assert len(bench.plans) == 6


def test_nothing_to_do_is_no_plan():
    bench = Bench()
    assert bench.scheduler.plan() is None
    assert not bench.scheduler.has_work()


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_batch_equals_alone(prefix_cache: bool, overlap: bool):
    rng = np.random.default_rng(0)
    requests = [
        make_request(str(i), rng.integers(0, 97, rng.integers(1, 40)), max_new=int(length))
        for i, length in enumerate(rng.integers(1, 20, 40))
    ]
    bench = Bench(prefix_cache=prefix_cache, overlap=overlap)
    bench.add(*requests)
    outputs = bench.run()
    for request in requests:
        check_output(request, outputs[request.rid])


def test_stop_token_ends_and_is_returned():
    tokens, _ = expected(make_request("a", range(5), max_new=10))
    request = make_request("a", range(5), max_new=10, stop_ids=[96, tokens[3]])
    bench = Bench()
    bench.add(request)
    output = bench.run()["a"]
    assert output.token_ids.tolist() == tokens[:4]
    assert (output.finish.type, output.finish.matched) == ("stop", tokens[3])


def test_min_new_tokens_bans_stop_tokens_until_then():
    stop_ids = list(range(60))
    request = make_request("a", range(5), max_new=30, min_new_tokens=7, stop_ids=stop_ids)
    bench = Bench()
    bench.add(request)
    output = bench.run()["a"]
    check_output(request, output)
    assert not set(output.token_ids[:7].tolist()) & set(stop_ids)
    assert len(output.token_ids) > 7


def test_stop_token_drawn_too_early_does_not_end():
    bench = Bench()
    bench.add(make_request("a", range(5), max_new=4, min_new_tokens=2, stop_ids=[50]))
    for count in range(3):
        plan = bench.scheduler.plan()
        drawn = np.array([50], np.int32)
        result = StepResult(step=plan.step, token_ids=drawn, logprobs=np.zeros(1, np.float32))
        outputs = bench.scheduler.apply(result)
        assert bool(outputs) == (count == 2)
    assert outputs[0].finish.type == "stop"
    bench.check_empty()


def test_output_is_clipped_to_the_context():
    bench = Bench(context_length=16)
    request = make_request("a", range(10), max_new=50)
    bench.add(request)
    output = bench.run()["a"]
    assert len(output.token_ids) == 6 and output.finish.type == "length"
    assert output.token_ids.tolist() == expected(request)[0][:6]


def test_decode_first_then_chunks_within_the_budget():
    bench = Bench(max_step_tokens=16, max_chunk_tokens=8, policy="fcfs")
    bench.add(make_request("a", range(4), max_new=30))
    bench.step()
    bench.add(make_request("b", range(50, 90), max_new=2), make_request("c", range(20), max_new=2))
    bench.run()
    assert all(plan.query_lens.sum() <= 16 for plan in bench.plans)
    assert all(plan.query_lens.max() <= 8 for plan in bench.plans)
    assert bench.plans[1].query_lens.tolist() == [1, 8, 4], "a whole page of what is left"
    assert all(
        plan.query_lens[plan.slots.tolist().index(bench.plans[0].slots[0])] == 1
        for plan in bench.plans[1:30]
    )


def test_max_running_bounds_the_batch():
    bench = Bench(max_running=3)
    bench.add(*(make_request(str(i), [i, 1, 2], max_new=4) for i in range(10)))
    bench.run()
    assert max(len(plan.slots) for plan in bench.plans) == 3


def test_fewer_step_tokens_than_slots_still_finish():
    bench = Bench(max_running=8, max_step_tokens=3)
    requests = [make_request(str(i), range(i, i + 7), max_new=5) for i in range(6)]
    bench.add(*requests)
    outputs = bench.run()
    for request in requests:
        check_output(request, outputs[request.rid])
    assert all(plan.query_lens.sum() <= 3 for plan in bench.plans)


def test_streams_return_every_token_once():
    bench, request = Bench(), make_request("a", range(9), max_new=5, stream=True)
    bench.add(request, make_request("b", range(9), max_new=5))
    outputs = bench.run()
    assert [len(piece.token_ids) for piece in bench.outputs["a"]] == [1, 1, 1, 1, 1]
    assert len(bench.outputs["b"]) == 1
    check_output(request, outputs["a"])


@pytest.mark.parametrize("start", [0, 1, 5, 19])
@pytest.mark.parametrize("warm", [True, False])
def test_prompt_logprobs(start: int, warm: bool):
    bench = Bench(max_chunk_tokens=8)
    if warm:
        bench.add(make_request("w", range(20), max_new=2))
        bench.run()
    request = make_request("a", range(20), max_new=3, prompt_logprob_start=start, top_logprobs=2)
    bench.add(request)
    output = bench.run()["a"]
    check_output(request, output)
    assert output.cached_tokens <= max(start - 1, 0)
    assert output.prompt_top.ids.shape == (20 - max(start, 1), 2)


def test_scoring_without_sampling():
    bench = Bench(max_chunk_tokens=8)
    request = make_request("a", range(20), max_new=0, prompt_logprob_start=3)
    bench.add(request, make_request("b", range(5), max_new=3))
    output = bench.run()["a"]
    check_output(request, output)
    assert len(output.prompt_logprobs) == 17


def test_scoring_a_prompt_of_one_token():
    bench = Bench()
    bench.add(make_request("a", [7], max_new=0, prompt_logprob_start=0))
    output = bench.run()["a"]
    assert len(output.prompt_logprobs) == 0 and output.finish.type == "length"


def test_top_logprobs_only_for_who_asked():
    bench = Bench()
    bench.add(
        make_request("a", range(6), max_new=4, top_logprobs=3),
        make_request("b", range(7), max_new=4),
        make_request("c", range(8), max_new=4, top_logprobs=1),
    )
    outputs = bench.run()
    assert outputs["b"].top is None
    assert outputs["a"].top.ids.shape == (4, 3)
    assert outputs["c"].top.logprobs.shape == (4, 1)
    prompt = bench.executor._rows[int(bench.plans[0].slots[0])]
    ids, values = top_of(prompt.hashes[5], 3, 97)
    assert outputs["a"].top.ids[0].tolist() == ids
    assert outputs["a"].top.logprobs[0].tolist() == values


@pytest.mark.parametrize("overlap", [True, False])
def test_entropies_only_for_who_asked(overlap: bool):
    bench = Bench(overlap=overlap)
    requests = [
        make_request("a", range(6), max_new=9, entropy=True),
        make_request("b", range(7), max_new=4),
        make_request("c", range(8), max_new=7, entropy=True, stream=True),
    ]
    bench.add(*requests)
    outputs = bench.run()
    for request in requests:
        check_output(request, outputs[request.rid])
    assert len(bench.outputs["c"]) == 7


def test_entropies_are_cut_with_the_tokens():
    bench = Bench()
    request = make_request("a", range(6), max_new=20, entropy=True)
    bench.add(request)
    for _ in range(9):
        bench.step()
    (output,) = bench.scheduler.stop("a", 3, "x")
    assert len(output.token_ids) == 3
    check_entropies(request, output)


def test_abort_returns_partial_tokens_and_frees():
    bench = Bench(max_running=2)
    requests = [make_request(f"x{i}", range(i, i + 9), max_new=40) for i in range(4)]
    bench.add(*requests)
    for _ in range(5):
        bench.step()
    aborted = bench.keep(bench.scheduler.abort("x0", message="enough"))
    assert [output.rid for output in aborted] == ["x0"]
    tokens, logprobs = expected(requests[0])
    assert aborted[0].token_ids.tolist() == tokens[:5]
    assert aborted[0].logprobs.tolist() == logprobs[:5]
    assert (aborted[0].finish.type, aborted[0].finish.message) == ("abort", "enough")
    waiting = bench.keep(bench.scheduler.abort("x3"))
    assert len(waiting[0].token_ids) == 0
    outputs = bench.run()
    check_output(requests[1], outputs["x1"])
    check_output(requests[2], outputs["x2"])


def test_abort_by_prefix_and_all():
    bench = Bench()
    bench.add(*(make_request(rid, range(4), max_new=9) for rid in ("a-0", "a-1", "b-0", "c")))
    bench.step()
    assert bench.scheduler.abort("") == []
    assert bench.scheduler.abort("nobody") == []
    assert {output.rid for output in bench.scheduler.abort("a-")} == {"a-0", "a-1"}
    assert {output.rid for output in bench.scheduler.abort(all=True)} == {"b-0", "c"}
    assert not bench.scheduler.has_work()
    bench.check_empty()


def test_abort_by_exact_id_leaves_longer_ids_alone():
    bench = Bench()
    bench.add(*(make_request(rid, range(4), max_new=9) for rid in ("a-1", "a-10")))
    bench.step()
    assert [output.rid for output in bench.scheduler.abort(rid="a-1")] == ["a-1"]
    assert [output.rid for output in bench.scheduler.abort(rid="a-10")] == ["a-10"]
    bench.check_empty()


class Unscanned(dict):
    """Requests of which one may be asked for, but not all."""

    def _refuse(self) -> None:
        raise AssertionError("all requests were looked at for one")

    __iter__ = keys = values = items = _refuse


def test_abort_by_exact_id_looks_at_no_other_request():
    bench = Bench()
    bench.add(*(make_request(rid, range(4), max_new=9) for rid in ("a", "b")))
    requests = bench.scheduler._requests
    bench.scheduler._requests = bench.scheduler._endings._requests = Unscanned(requests)
    assert [output.rid for output in bench.scheduler.abort(rid="a")] == ["a"]
    assert bench.scheduler.abort(rid="a") == bench.scheduler.abort() == []
    found = dict(dict.items(bench.scheduler._requests))
    bench.scheduler._requests = bench.scheduler._endings._requests = found
    assert set(bench.run()) == {"b"}


def test_rid_may_be_used_again_once_gone():
    bench = Bench()
    bench.add(make_request("a", range(4)))
    with pytest.raises(InvalidRequest, match="already in use") as caught:
        bench.add(make_request("a", range(5)))
    assert caught.value.field == "rid"
    bench.run()
    bench.outputs.clear()
    again = make_request("a", range(5))
    bench.add(again)
    check_output(again, bench.run()["a"])


def test_stop_string_truncates():
    bench, request = Bench(), make_request("a", range(4), max_new=20)
    bench.add(request)
    for _ in range(6):
        bench.step()
    (output,) = bench.scheduler.stop("a", 4, "END")
    assert output.token_ids.tolist() == expected(request)[0][:4]
    assert len(output.logprobs) == 4
    assert (output.finish.type, output.finish.matched) == ("stop", "END")
    assert output.spans[-1].end == 4
    assert bench.scheduler.stop("a", 4, "END") == []
    bench.check_empty()


def test_stop_string_behind_what_a_stream_returned():
    bench = Bench()
    bench.add(make_request("a", range(4), max_new=20, stream=True))
    for _ in range(6):
        bench.step()
    (output,) = bench.scheduler.stop("a", 4, "END")
    assert (output.start, len(output.token_ids)) == (4, 0)


def test_queue_limit():
    bench = Bench(max_waiting=2, max_running=1)
    bench.add(make_request("a", [1]), make_request("b", [1]))
    with pytest.raises(QueueFull, match="2 requests wait"):
        bench.add(make_request("c", [1]))
    bench.step()
    bench.add(make_request("c", [1]))
    assert set(bench.run()) == {"a", "b", "c"}


def test_refused_request_leaves_the_others_alone():
    bench, good = Bench(), make_request("a", range(8))
    bench.add(good)
    bench.step()
    with pytest.raises(InvalidRequest):
        bench.add(make_request("b", [1000]))
    check_output(good, bench.run()["a"])
    assert "b" not in bench.outputs


def test_dead_executor_ends_every_request():
    bench = Bench(max_running=2)
    bench.add(*(make_request(str(i), range(9), max_new=9) for i in range(4)))
    bench.step()
    bench.scheduler.plan()
    outputs = bench.scheduler.fail_all(ErrorInfo(kind="EngineDead", message="rank 0 died"))
    assert {output.rid for output in outputs} == set("0123")
    assert {output.finish.error for output in outputs} == {"EngineDead"}
    assert outputs[0].finish.message == "rank 0 died"
    bench.check_empty()
    assert bench.scheduler.stats().cached_pages == 0


def test_flush_cache():
    bench = Bench()
    bench.add(make_request("a", range(20)))
    bench.step()
    with pytest.raises(SlipstreamError, match="flush refused"):
        bench.scheduler.flush_cache()
    bench.run()
    assert bench.scheduler.stats().cached_pages > 0
    bench.scheduler.flush_cache()
    assert bench.scheduler.stats().free_pages == 256


def test_priorities_first_but_none_starves():
    bench = Bench(max_running=1, starvation_steps=5, policy="fcfs")
    bench.add(make_request("low", [1, 2], max_new=1))
    for index in range(20):
        bench.add(make_request(f"high{index}", [index, 3], max_new=1, priority=1))
    bench.run()
    finished = list(bench.outputs)
    assert finished.index("low") == 5


def test_stats_count():
    bench = Bench()
    bench.add(make_request("a", range(12), max_new=4), make_request("b", range(40, 50), max_new=3))
    bench.step()
    assert (bench.scheduler.stats().num_running, bench.scheduler.stats().num_waiting) == (2, 0)
    bench.run()
    stats = bench.scheduler.stats()
    assert (stats.num_prompt_tokens, stats.num_output_tokens, stats.num_steps) == (22, 7, 4)
    assert joined(bench.outputs["a"]).cached_tokens == stats.num_cached_tokens == 0


def test_a_client_that_leaves_ends_no_sample_whose_shown_id_is_its_own() -> None:
    bench = Bench()
    bench.add(make_request(sample_id("q", 0), range(4), max_new=9))
    assert bench.scheduler.abort(rids=["q-0"]) == []
    assert [output.rid for output in bench.scheduler.abort(rid="q-0")] == [sample_id("q", 0)]
