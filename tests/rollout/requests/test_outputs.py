"""Outputs cut and joined: every column has an entry a token, or none."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol import (
    FinishReason,
    GenerateRequest,
    Request,
    RequestOutput,
    SamplingParams,
    TopLogprobs,
    VersionSpan,
)
from rollout.http.native.sample import Sample
from rollout.requests.outputs import LEAST_LOGPROB, finite_logprobs, head, join_outputs
from rollout.requests.respond import respond
from tests.helpers.tiny_tokenizer import ids_of, tiny_tokenizer

PER_TOKEN = {"token_ids", "logprobs", "entropies", "top"}
SPANS = {"spans", "kv_spans", "routed_experts"}
WHOLE = {"rid", "start", "finish", "prompt_tokens", "cached_tokens", "num_retractions"}
WHOLE |= {"num_restarts", "prompt_logprobs", "prompt_top", "scores", "embedding", "spec"}
WHOLE |= {"routed_experts_start", "queue_s"}
PROMPT = 3
ROUTES_FROM = 2


def output(ids: list[int], start: int = 0, **fields: object) -> RequestOutput:
    """An output with every column; entries say their position."""
    at = np.arange(start, start + len(ids), dtype=np.float32)
    end = start + len(ids)
    made = RequestOutput(
        rid="a",
        start=start,
        token_ids=np.array(ids, np.int32),
        logprobs=-at - 1,
        entropies=at,
        prompt_tokens=PROMPT,
        top=TopLogprobs(np.array(ids, np.int32)[:, None], -at[:, None] - 1),
        spans=[VersionSpan(v, max(start, 2 * v), min(end, 2 * v + 2)) for v in range(9)],
        kv_spans=[VersionSpan(1, 0, PROMPT + 2), VersionSpan(2, PROMPT + 2, PROMPT + end)],
        routed_experts=np.arange(ROUTES_FROM, PROMPT + end - 1, dtype=np.uint8)[:, None, None],
        routed_experts_start=ROUTES_FROM,
    )
    spans = [span for span in made.spans if span.start < span.end]
    return msgspec.structs.replace(made, spans=spans, **fields)


def test_every_field_of_an_output_is_of_a_token_or_of_the_whole() -> None:
    """A new column of tokens belongs into `head`, `join_outputs` and this file."""
    assert set(RequestOutput.__struct_fields__) == PER_TOKEN | SPANS | WHOLE


@given(st.integers(0, 8), st.integers(0, 10), st.integers(0, 5))
def test_a_head_has_so_many_of_everything(size: int, count: int, start: int) -> None:
    found = head(output(list(range(size)), start), count)
    kept = min(size, count)
    assert found.top is not None and found.entropies is not None
    columns = (found.token_ids, found.logprobs, found.entropies, found.top.ids, found.top.logprobs)
    assert [len(column) for column in columns] == [kept] * 5
    positions = [p for span in found.spans for p in range(span.start, span.end)]
    assert positions == list(range(start, start + kept))
    if count < size:
        assert max((span.end for span in found.kv_spans), default=0) <= PROMPT + start + kept
    assert found.routed_experts is not None
    routed = list(range(ROUTES_FROM, PROMPT + start + kept - 1))
    assert found.routed_experts.ravel().tolist() == routed


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(0, 15))
def test_joined_pieces_are_cut_like_the_whole(sizes: list[int], count: int) -> None:
    ids, pieces, start = list(range(sum(sizes))), [], 0
    for size in sizes:
        pieces.append(output(ids[start : start + size], start))
        start += size
    found, want = head(join_outputs(pieces), count), head(output(ids), count)
    assert msgspec.msgpack.encode(_plain(found)) == msgspec.msgpack.encode(_plain(want))


def _plain(found: RequestOutput) -> dict[str, object]:
    assert found.top is not None and found.entropies is not None
    return {
        "ids": found.token_ids.tolist(),
        "logprobs": found.logprobs.tolist(),
        "entropies": found.entropies.tolist(),
        "top": found.top.ids.tolist(),
        "spans": found.spans,
    }


@pytest.mark.parametrize("sizes", [[1] * 6, [6], [2, 4], [4, 2]])
def test_what_a_stop_string_cuts_off_a_stream_is_gone_from_every_column(sizes: list[int]) -> None:
    ids = ids_of("abENDx")
    wire = GenerateRequest(
        input_ids=[0] * PROMPT,
        sampling_params=SamplingParams(stop="END"),
        return_logprob=True,
        return_entropy=True,
        return_text_in_logprobs=True,
        top_logprobs_num=1,
        logprob_start_len=0,
        stream=True,
    )
    request = Request(
        rid="a",
        prompt_ids=np.zeros(PROMPT, np.int32),
        sampling=wire.sampling_params,
        seed=0,
        top_logprobs=1,
        prompt_logprob_start=0,
        entropy=True,
        stream=True,
    )
    sample = Sample(wire, request, tiny_tokenizer(), stream=True)
    sample.keep_replies()
    increments: list[dict[str, list[object]]] = []
    start = 0
    for size in sizes:
        end = start + size
        finish = FinishReason(type="length", length=6) if end == 6 else None
        scores = None if start else np.array([-1, -2], np.float32)
        piece = output(ids[start:end], start, finish=finish, prompt_logprobs=scores)
        delta = sample.take(piece)
        partial, more = sample.partial(), sample.increment(delta)
        for reply in (partial, more):
            _check_columns(reply.output_ids, reply.meta_info)
        increments.append({"ids": more.output_ids, **more.meta_info})
        start = end
    assert [token for part in increments for token in part["ids"]] == ids[:5]
    assert [e for part in increments for e in part["output_token_entropy"]] == [0, 1, 2, 3, 4]
    prompts = [part.get("input_token_logprobs", []) for part in increments]
    assert [len(prompt) for prompt in prompts] == [PROMPT] + [0] * (len(sizes) - 1)
    assert sample.response().text == "ab"
    _check_columns(sample.response().output_ids, sample.response().meta_info)


def _check_columns(ids: list[int], meta: dict[str, object]) -> None:
    for name in ("output_token_logprobs", "output_top_logprobs", "output_token_entropy"):
        assert len(meta[name]) == len(ids), name
    texts = [text for _, _, text in meta["output_token_logprobs"]]
    assert texts == [tiny_tokenizer().decode([token]) for token in ids]


def test_what_cannot_come_has_a_number_below_all_others() -> None:
    inf = float("inf")
    assert finite_logprobs(np.array([-1, -inf], np.float32)) == [-1, LEAST_LOGPROB]
    assert finite_logprobs(np.array([[-2e4, -inf]], np.float32)) == [[-2e4, -2e4]]
    assert finite_logprobs(np.array([-inf, -inf], np.float32)) == [LEAST_LOGPROB] * 2
    assert finite_logprobs(np.empty((0, 3), np.float32)) == []


def test_a_native_reply_has_no_null_among_the_likeliest() -> None:
    top = np.array([[-0.5, -np.inf]], np.float32)
    made = RequestOutput(
        rid="a",
        start=0,
        token_ids=np.array([7], np.int32),
        logprobs=np.array([-0.5], np.float32),
        finish=FinishReason(type="length", length=1),
        top=TopLogprobs(np.array([[7, 8]], np.int32), top),
        prompt_logprobs=np.array([-0.5], np.float32),
        prompt_top=TopLogprobs(np.array([[7, 8]], np.int32), top),
    )
    request = Request(
        rid="a",
        prompt_ids=np.array([1, 7], np.int32),
        sampling=SamplingParams(),
        seed=0,
        top_logprobs=2,
        prompt_logprob_start=0,
    )
    wire = GenerateRequest(
        input_ids=[1, 7], return_logprob=True, top_logprobs_num=2, logprob_start_len=0
    )
    meta = respond(wire, request, made, None).meta_info
    likeliest = [[-0.5, 7, None], [LEAST_LOGPROB, 8, None]]
    assert meta["output_top_logprobs"] == [likeliest]
    assert meta["input_top_logprobs"] == [None, likeliest]
