"""Requests that come with output tokens, and requests that are held: the parts are the whole."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from engine.errors import ContextTooLong, InvalidRequest
from engine.protocol import FinishReason, Request, RequestOutput
from tests.helpers.mock_executor import top_of
from tests.helpers.scheduling import (
    VOCAB,
    Bench,
    check_output,
    expected,
    expected_prompt_logprobs,
    joined,
    make_request,
)

PROMPT = range(5)
STOPS = list(range(0, VOCAB, 7))
KINDS = {
    "plain": {},
    "stops": {"stop_ids": STOPS, "max_new": 60},
    "minimum": {"stop_ids": list(range(0, VOCAB, 2)), "min_new_tokens": 9},
    "columns": {"entropy": True, "top_logprobs": 2, "stream": True},
}


def whole(kind: str, **fields: object) -> Request:
    return make_request("a", PROMPT, **{"max_new": 16, **KINDS[kind], **fields})


def going_on(request: Request, num_tokens: int, rid: str = "", **fields: object) -> Request:
    """`request` as one that comes with the first tokens of its output."""
    ids = np.array(expected(request)[0][:num_tokens], np.int32)
    return msgspec.structs.replace(request, rid=rid or request.rid, output_ids=ids, **fields)


def answer(request: Request, **config: object) -> RequestOutput:
    bench = Bench(**config)
    bench.add(request)
    return bench.run()[request.rid]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_request_cut_anywhere_goes_on_as_it_would_have(kind: str, overlap: bool) -> None:
    request = whole(kind)
    uncut = answer(request, overlap=overlap)
    size = len(uncut.token_ids)
    assert size > 6 or kind == "stops"
    for cut in range(1, size + 1):
        part = answer(going_on(request, cut), overlap=overlap)
        check_output(request, part)
        assert (part.start, part.finish) == (cut, uncut.finish)
        assert part.prompt_tokens == len(PROMPT)
        assert all(span.version == 0 for span in part.spans)


def test_it_enters_as_a_retracted_one_does() -> None:
    """What the ranks are told is equal: with that, all they compute is."""
    request = whole("columns", prompt_logprob_start=2, min_new_tokens=3, stop_ids=STOPS)
    bench = Bench()
    bench.add(request)
    for _ in range(6):
        bench.step()
    bench.scheduler.pause("retract")
    bench.scheduler.resume()
    retracted = bench.step().new_rows[0]
    num_tokens = len(retracted.token_ids) - len(PROMPT)
    assert num_tokens > 3
    other = Bench()
    other.add(going_on(request, num_tokens, prompt_logprob_start=-1))
    (entered,) = other.step().new_rows
    assert entered.token_ids.tolist() == retracted.token_ids.tolist()
    assert entered.prompt_len == retracted.prompt_len
    assert entered.sampling == retracted.sampling
    assert entered.prompt_logprob_start == retracted.prompt_logprob_start == -1


def test_likeliest_tokens_are_those_of_the_tokens_returned() -> None:
    request = whole("columns", stream=False)
    uncut, part = answer(request), answer(going_on(request, 5))
    assert part.top.ids.tolist() == uncut.top.ids[5:].tolist()
    assert part.top.logprobs.tolist() == uncut.top.logprobs[5:].tolist()
    assert len(top_of(1, 2, VOCAB)[0]) == part.top.ids.shape[1]


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_continued_requests_are_retracted_like_any(prefix_cache: bool, overlap: bool) -> None:
    bench = Bench(
        num_pages=14, page_size=4, prefix_cache=prefix_cache, overlap=overlap, max_running=6
    )
    bench.scheduler._reserve._ratio = 0.0
    requests = [
        make_request(str(i), range(10 * i, 10 * i + 5), max_new=24, entropy=True, top_logprobs=1)
        for i in range(6)
    ]
    bench.add(*(going_on(request, 2 * i) for i, request in enumerate(requests)))
    outputs = bench.run()
    assert sum(output.num_retractions for output in outputs.values()) > 0
    for i, request in enumerate(requests):
        check_output(request, outputs[request.rid])
        assert outputs[request.rid].start == 2 * i
        assert len(outputs[request.rid].top.ids) == 24 - 2 * i


@pytest.mark.parametrize("overlap", [True, False])
def test_held_at_every_index_the_parts_are_the_whole(overlap: bool) -> None:
    request = whole("stops", stop_ids=[], max_new=12)
    tokens, logprobs = expected(request)
    for hold_at in range(1, 12):
        held = answer(msgspec.structs.replace(request, hold_at=hold_at), overlap=overlap)
        assert held.finish == FinishReason(type="hold", length=hold_at)
        assert held.token_ids.tolist() == tokens[:hold_at]
        assert held.logprobs.tolist() == logprobs[:hold_at]
        given = msgspec.structs.replace(request, output_ids=held.token_ids)
        rest = answer(given, overlap=overlap)
        assert held.token_ids.tolist() + rest.token_ids.tolist() == tokens
        assert held.logprobs.tolist() + rest.logprobs.tolist() == logprobs


def test_whatever_else_ends_a_request_comes_before_a_hold() -> None:
    at_length = answer(whole("plain", max_new=4, hold_at=4))
    assert at_length.finish == FinishReason(type="length", length=4)
    beyond = answer(whole("plain", max_new=4, hold_at=9))
    assert beyond.finish == FinishReason(type="length", length=4)
    stopped = answer(whole("stops"))
    size = len(stopped.token_ids)
    assert answer(whole("stops", hold_at=size)).finish == stopped.finish
    assert stopped.finish.type == "stop"
    full = answer(whole("plain", max_new=50, hold_at=16), num_pages=5, page_size=4)
    assert (len(full.token_ids), full.finish.error) == (16, "OutOfMemory")


def test_a_held_request_leaves_its_kv_to_whoever_goes_on() -> None:
    bench = Bench()
    request = whole("plain", hold_at=9)
    bench.add(request)
    bench.run()
    computed = bench.executor.num_computed
    bench.add(going_on(request, 9, "b", hold_at=10))
    output = bench.run()["b"]
    # The last token of a sequence has no KV: nothing was sampled with it.
    assert bench.executor.num_computed == computed + 2
    # What was cached of a prompt is at most all of it.
    assert output.cached_tokens == output.prompt_tokens == len(PROMPT)
    stats = bench.scheduler.stats()
    assert stats.num_cached_tokens <= stats.num_prompt_tokens
    assert stats.num_output_tokens == 10


@pytest.mark.parametrize("kind", ["stops", "minimum", "plain"])
def test_a_request_that_was_over_is_answered_at_once(kind: str) -> None:
    request = whole(kind)
    uncut = answer(request)
    size = len(uncut.token_ids)
    bench = Bench()
    output = bench.scheduler.add(going_on(request, size))
    assert output is not None and not bench.scheduler.has_work()
    assert (output.start, output.finish) == (size, uncut.finish)
    assert len(output.token_ids) == len(output.logprobs) == 0 and output.spans == []


def test_tokens_beyond_a_stop_are_cut_off() -> None:
    """A stream may have brought some before it heard of the end."""
    request = whole("stops")
    tokens = expected(request)[0]
    beyond = np.array([*tokens, 1, 2, STOPS[3]], np.int32)
    output = answer(msgspec.structs.replace(request, output_ids=beyond))
    assert output.start == len(tokens)
    assert output.finish == FinishReason(type="stop", matched=tokens[-1])


def test_stop_tokens_within_the_minimum_end_nothing() -> None:
    """They cannot be sampled, but may be given."""
    given = np.array([STOPS[1]] * 9, np.int32)
    request = whole("minimum", output_ids=given, stop_ids=STOPS)
    output = answer(request)
    assert output.start == 9 and len(output.token_ids) > 0


@pytest.mark.parametrize("over", [True, False])
def test_the_prompt_is_scored_for_a_continued_request_too(over: bool) -> None:
    request = whole("columns", prompt_logprob_start=0, stream=False, max_new=6)
    output = answer(going_on(request, 6 if over else 2), max_chunk_tokens=3)
    assert output.prompt_logprobs.tolist() == expected_prompt_logprobs(request)
    assert output.prompt_top.ids.shape == (len(PROMPT) - 1, 2)
    assert output.finish == FinishReason(type="length", length=6)
    check_output(request, output)


def test_scoring_a_prompt_samples_nothing_for_one_that_was_over() -> None:
    request = whole("stops", prompt_logprob_start=0)
    size = len(expected(request)[0])
    bench = Bench(overlap=True)
    bench.add(going_on(request, size))
    output = bench.run()["a"]
    assert output.finish.type == "stop" and len(output.token_ids) == 0
    (plan,) = bench.plans
    assert not plan.samples.any()


def test_an_update_stamps_the_tokens_after_it() -> None:
    request = going_on(whole("plain", stream=True), 3)
    bench = Bench()
    bench.add(request)
    for _ in range(4):
        bench.step()
    bench.set_version(7)
    output = bench.run()["a"]
    check_output(request, output)
    assert [span.version for span in output.spans] == [0] * 4 + [7] * 9


@pytest.mark.parametrize("policy", ["keep", "recompute", "fresh"])
def test_what_an_update_does_to_one_that_waits(policy: str) -> None:
    """`fresh` would have to take back tokens that somebody else has."""
    request = going_on(whole("plain", kv_policy=policy), 3)
    bench = Bench()
    bench.scheduler.pause("keep")
    bench.add(request)
    ended = bench.set_version(1)
    bench.scheduler.resume()
    bench.run()
    output = joined(bench.outputs["a"])
    assert bool(ended) == (policy == "fresh")
    if policy == "fresh":
        assert (output.finish.error, output.start) == ("WeightUpdateError", 3)
    else:
        check_output(request, output)


def test_an_aborted_one_has_what_it_sampled_itself() -> None:
    request = going_on(whole("plain"), 3)
    bench = Bench()
    bench.add(request)
    bench.step()
    bench.step()
    (output,) = bench.scheduler.abort("a")
    assert output.start == 3
    assert output.token_ids.tolist() == expected(request)[0][3:5]
    bench.add(request)
    (waiting,) = bench.scheduler.abort("a")
    assert (waiting.start, len(waiting.token_ids)) == (3, 0)
    bench.check_empty()


def test_a_stop_string_before_its_tokens_cuts_those_that_came_with_it() -> None:
    bench = Bench()
    bench.add(going_on(whole("columns"), 6))
    bench.step()
    (output,) = bench.scheduler.stop("a", 4, "END")
    assert (output.start, len(output.token_ids), len(output.top.ids)) == (4, 0, 0)
    assert output.spans == []


BAD = [
    ({"output_ids": np.array([3, VOCAB], np.int32)}, "output_ids", InvalidRequest),
    ({"output_ids": np.array([-1], np.int32)}, "output_ids", InvalidRequest),
    ({"output_ids": np.array([[1]], np.int32)}, "output_ids", InvalidRequest),
    ({"output_ids": np.array([1.0])}, "output_ids", InvalidRequest),
    ({"output_ids": [1]}, "output_ids", InvalidRequest),
    ({"output_ids": np.ones(17, np.int32)}, "output_ids", InvalidRequest),
    ({"output_ids": np.ones(124, np.int32), "max_new": 200}, "output_ids", ContextTooLong),
    ({"output_ids": np.ones(3, np.int32), "hold_at": 3}, "hold_at", InvalidRequest),
    ({"output_ids": np.ones(3, np.int32), "hold_at": 2}, "hold_at", InvalidRequest),
    ({"hold_at": 0}, "hold_at", InvalidRequest),
    ({"hold_at": -2}, "hold_at", InvalidRequest),
    ({"hold_at": 2**31}, "hold_at", InvalidRequest),
    ({"hold_at": 1.5}, "hold_at", InvalidRequest),
]


@pytest.mark.parametrize(("fields", "field", "kind"), BAD)
def test_what_cannot_be_continued_is_refused(
    fields: dict[str, object], field: str, kind: type[InvalidRequest]
) -> None:
    bench = Bench()
    with pytest.raises(kind) as raised:
        bench.add(whole("plain", **fields))
    assert raised.value.field == field
    assert raised.value.message.startswith(field)
    bench.check_empty()


def test_the_context_may_be_full_and_the_pool() -> None:
    request = whole("plain", max_new=200)
    room = 128 - len(PROMPT)
    full = going_on(request, room)
    assert answer(full).finish == FinishReason(type="length", length=room)
    last = answer(going_on(request, room - 1))
    assert (len(last.token_ids), last.finish.length) == (1, room)
    pool = {"num_pages": 5, "page_size": 4}
    with pytest.raises(ContextTooLong):
        Bench(**pool).add(going_on(request, 16))
    fits = answer(going_on(request, 15), **pool)
    assert (len(fits.token_ids), fits.finish.error) == (1, "OutOfMemory")
