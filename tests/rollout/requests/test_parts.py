"""Replies in parts: text, tokens, scores and counts of the reply that was not cut."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.protocol import (
    FinishReason,
    GenerateRequest,
    GenerateResponse,
    ReplicaState,
    Request,
    RequestOutput,
    SamplingParams,
    TopLogprobs,
    VersionSpan,
)
from rollout.http.native.sample import Sample
from rollout.requests.expand import expand, with_seed
from rollout.requests.parts import continued, joined, unfinished
from rollout.scheduler.continued import give, num_given
from rollout.scheduler.encode import row_numbers
from rollout.scheduler.sequence import Sequence
from tests.helpers.replicas import inline
from tests.helpers.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXT = "a ñ€😀 END of 日本 ENDING\ufffd."
SCORES = {
    "return_logprob": True,
    "top_logprobs_num": 1,
    "token_ids_logprob": [7, 9],
    "return_entropy": True,
}


@pytest.fixture(scope="module")
def state() -> ReplicaState:
    with inline() as replica:
        return replica.state()


def ids_of_text(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def script(ids: list[int], request: Request) -> list[RequestOutput]:
    """What an engine that samples `ids` says of a request, a token at a time."""
    sequence = Sequence(
        request=request,
        arrival=0,
        group_order=0,
        numbers=row_numbers(request, 500),
        tokens=request.prompt_ids,
    )
    start, finish = 0, None
    if request.output_ids is not None:
        give(sequence, request.output_ids)
        start, finish = sequence.num_given, sequence.ended
    outputs: list[RequestOutput] = []
    for at in range(start, 500):
        if finish is not None:
            break
        size = at + 1
        if ids[at] in request.stop_ids and size > request.sampling.min_new_tokens:
            finish = FinishReason(type="stop", matched=ids[at])
        elif size >= request.sampling.max_new_tokens:
            finish = FinishReason(type="length", length=size)
        elif size == request.hold_at:
            finish = FinishReason(type="hold", length=size)
        outputs.append(output(request, at, [ids[at]], finish))
    return outputs or [output(request, start, [], finish)]


def output(
    request: Request, start: int, ids: list[int], finish: FinishReason | None
) -> RequestOutput:
    at = np.arange(start, start + len(ids), dtype=np.float32)
    return RequestOutput(
        rid=request.rid,
        start=start,
        token_ids=np.array(ids, np.int32),
        logprobs=-at,
        finish=finish,
        prompt_tokens=len(request.prompt_ids),
        spans=[VersionSpan(v // 5, v, v + 1) for v in range(start, start + len(ids))],
        top=TopLogprobs(
            np.array([[token, 7, 9] for token in ids], np.int32).reshape(-1, 3),
            np.stack([-at, -at - 1, -at - 2], axis=1),
        ),
        entropies=at,
    )


def frames(
    wire: GenerateRequest, ids: list[int], state: ReplicaState, *, stream: bool = False
) -> list[GenerateResponse]:
    """The replies of one call of one sample, the last with its finish; `ids` are what its engine
    would sample."""
    (request,) = expand(wire, TOKENIZER, state, 7)
    sample = Sample(with_seed(wire, 7), request, TOKENIZER, stream=stream)
    if stream:
        sample.keep_replies()
    found = []
    for said in script(ids, sample.request):
        delta = sample.take(said)
        if sample.stop is not None and not delta.finished:
            end = FinishReason(type="stop", matched=sample.stop.matched)
            delta = sample.take(output(sample.request, said.start + 1, [], end))
        found.append(encoded(sample.partial() if stream else None, sample))
        if delta.finished:
            break
    return found


def encoded(reply: GenerateResponse | None, sample: Sample) -> GenerateResponse:
    if reply is None:
        if sample.finish is None:
            return GenerateResponse()
        reply = sample.response()
    return msgspec.json.decode(msgspec.json.encode(reply), type=GenerateResponse)


def ask(ids: list[int], **fields: Any) -> GenerateRequest:
    names = set(SamplingParams.__struct_fields__)
    sampling = {"max_new_tokens": len(ids), "ignore_eos": True, "sampling_seed": 7}
    sampling |= {name: fields.pop(name) for name in names & fields.keys()}
    return GenerateRequest(
        input_ids=[5], rid="a", sampling_params=SamplingParams(**sampling), **SCORES, **fields
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stop": {"stop": ["END of 日", "ING"]},
    "kept_stop": {"stop": "ENDI", "no_stop_trim": True},
    "late_stop": {"stop": "END", "min_new_tokens": 16},
    "broken": {"stop": "\ufffd"},
    "stop_token": {"stop_token_ids": [ids_of_text(".")[0]], "stop": ".x"},
    "stop_token_is_a_stop": {"stop_token_ids": [ids_of_text(".")[0]], "stop": "."},
    "kept_stop_token": {"stop_token_ids": [ids_of_text(".")[0]], "no_stop_trim": True, "stop": "."},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_two_parts_are_the_whole_at_every_cut(
    options: dict[str, Any], stream: bool, state: ReplicaState
) -> None:
    ids = ids_of_text(TEXT)
    wire = ask(ids, **options)
    whole = frames(wire, ids, state, stream=stream)[-1]
    for hold_at in range(1, len(ids) + 1):
        first = frames(msgspec.structs.replace(wire, hold_at=hold_at), ids, state, stream=stream)
        held = first[-1].meta_info["finish_reason"]["type"] == "hold"
        assert unfinished(first[-1:]) == held
        rest = continued(wire, first[-1:])
        assert rest.output_ids == first[-1].output_ids
        last = frames(rest, ids, state, stream=stream)
        assert last[-1].meta_info["completion_tokens"] == whole.meta_info["completion_tokens"]
        assert last[-1].meta_info["finish_reason"] == whole.meta_info["finish_reason"]
        assert joined([first[-1:], last[-1:]]) == [whole]
        if held:
            # The text of a held part ends where that of the next begins.
            assert first[-1].text + last[-1].text == whole.text
            assert last[-1].meta_info["text_start"] == len(first[-1].text)
        if stream:
            texts = [frame.text for frame in last]
            assert all(texts[-1].startswith(text) for text in texts)


def test_a_stream_of_increments_goes_on(state: ReplicaState) -> None:
    ids = ids_of_text(TEXT)
    wire = ask(ids, stop=["ING"])
    whole = frames(wire, ids, state)[-1]
    for cut in range(1, len(whole.output_ids) + 1):
        rest = msgspec.structs.replace(wire, output_ids=ids[:cut])
        (request,) = expand(rest, TOKENIZER, state, 7)
        sample = Sample(rest, request, TOKENIZER, stream=True)
        texts, tokens = [], []
        for said in [*script(ids, sample.request), None]:
            if said is None or sample.stop is not None:
                end = FinishReason(type="stop", matched=sample.stop.matched)
                said = output(sample.request, cut + len(tokens), [], end)
            delta = sample.take(said)
            reply = sample.increment(delta)
            texts.append(reply.text)
            tokens += reply.output_ids
            done = cut + len(tokens)
            assert reply.meta_info["completion_tokens"] == done
            assert reply.meta_info["output_start"] == cut
            if delta.finished:
                break
        assert ids[:cut] + tokens == whole.output_ids
        start = reply.meta_info["text_start"]
        assert whole.text[:start] + "".join(texts) == whole.text
        assert reply.meta_info["finish_reason"] == whole.meta_info["finish_reason"]


def test_what_came_beyond_a_stop_is_cut_off(state: ReplicaState) -> None:
    """Tokens of an engine that had not heard of the stop string yet, or an aborted reply whose text
    was flushed."""
    ids = ids_of_text(TEXT)
    for options in OPTIONS.values():
        wire = ask(ids, **options)
        whole = frames(wire, ids, state)[-1]
        for cut in range(1, len(ids) + 1):
            first = frames(ask(ids[:cut]), ids, state)[-1:]
            rest = frames(continued(wire, first), ids, state)[-1:]
            assert joined([first, rest]) == [whole]


def test_a_stream_that_broke_off_goes_on_from_its_last_frame(state: ReplicaState) -> None:
    ids = ids_of_text(TEXT)
    for options in OPTIONS.values():
        wire = ask(ids, **options)
        stream = frames(wire, ids, state, stream=True)
        for frame in stream[:-1]:
            assert unfinished([frame])
            rest = frames(continued(wire, [frame]), ids, state)[-1:]
            assert joined([[frame], rest]) == [frames(wire, ids, state)[-1]]


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.sampled_from("ab€😀 \ufffdE"), min_size=1, max_size=12),
    tail=st.lists(st.integers(0, 255), max_size=5),
    stops=st.lists(st.text(st.sampled_from("ab€E\ufffd"), min_size=1, max_size=3), max_size=3),
    least=st.integers(0, 4),
    keep=st.booleans(),
    cuts=st.lists(st.integers(1, 50), max_size=5, unique=True).map(sorted),
)
def test_cut_several_times(
    text: str, tail: list[int], stops: list[str], least: int, keep: bool, cuts: list[int]
) -> None:
    with inline() as replica:
        state = replica.state()
    ids = [*ids_of_text(text), *tail]
    wire = ask(ids, stop=stops, min_new_tokens=min(least, len(ids)), no_stop_trim=keep)
    whole = frames(wire, ids, state)[-1]
    parts, part = [], msgspec.structs.replace(wire, hold_at=cuts[0] if cuts else -1)
    for hold_at in [*cuts[1:], -1]:
        parts.append(frames(part, ids, state)[-1:])
        if not unfinished(parts[-1]):
            break
        part = continued(part, parts[-1], hold_at=hold_at)
    else:
        if unfinished(parts[-1]):
            parts.append(frames(part, ids, state)[-1:])
    assert joined(parts) == [whole]


def test_the_seed_of_a_held_reply_is_stated(state: ReplicaState) -> None:
    ids = ids_of_text("abc")
    wire = msgspec.structs.replace(ask(ids), sampling_params=SamplingParams(max_new_tokens=3))
    held = frames(msgspec.structs.replace(wire, hold_at=1), ids, state)[-1:]
    assert held[0].meta_info["sampling_seed"] == 7
    rest = continued(wire, held, hold_at=2)
    assert (rest.sampling_params.sampling_seed, rest.hold_at) == (7, 2)
    assert "sampling_seed" not in frames(wire, ids, state)[-1].meta_info
    assert expand(rest, TOKENIZER, state, 99)[0].seed == expand(wire, TOKENIZER, state, 7)[0].seed


def test_samples_are_continued_together() -> None:
    def reply(ids: list[int], reason: str, start: int = 0) -> GenerateResponse:
        meta = {"finish_reason": {"type": reason}, "output_start": start}
        return GenerateResponse(output_ids=ids, meta_info=meta)

    wire = GenerateRequest(input_ids=[1], sampling_params=SamplingParams(n=2, sampling_seed=3))
    first = [reply([4, 5], "hold"), reply([6], "stop")]
    assert unfinished(first) and not unfinished([reply([], "length"), reply([], "stop")])
    second = continued(wire, first, hold_at=4)
    assert (second.output_ids, second.hold_at) == ([[4, 5], [6]], 4)
    third = continued(second, [reply([7, 8], "hold", 2), reply([], "stop", 1)])
    assert (third.output_ids, third.hold_at) == ([[4, 5, 7, 8], [6]], -1)


def test_a_sample_without_tokens_may_be_among_them(state: ReplicaState) -> None:
    wire = ask([1, 2, 3], n=2)
    found = expand(msgspec.structs.replace(wire, output_ids=[[], [1]]), None, state, 0)
    assert [num_given(request) for request in found] == [0, 1]
    assert found[0].seed != found[1].seed
