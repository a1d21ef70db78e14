"""A frame that is written into the gaps of another is the one that would be made in full."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from hypothesis import given, settings
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
from rollout.http.edge.sse import frame
from rollout.http.native import increments
from rollout.http.native.increments import IncrementWriter
from rollout.http.native.sample import Sample
from rollout.http.updates.version_labels import VersionLabels
from rollout.requests.respond import to_wire
from tests.helpers.tiny_tokenizer import tiny_tokenizer

TEXT = 'a "b" 100%b \\x00 {"c": [1]} END é and more of it, to be cut'
TOKENIZER = tiny_tokenizer()
KINDS = st.sampled_from(
    ["plain"] * 12 + ["two spans", "top", "entropies", "spec", "label", "retracted", "nothing"]
)


def outputs_of(kinds: list[tuple[str, int]], ids: list[int], start: int) -> list[RequestOutput]:
    found = []
    version, retractions = 0, 0
    for number, (kind, size) in enumerate(kinds):
        size = 0 if kind == "nothing" else size
        own = np.array(ids[:size], np.int32)
        ids, end = ids[len(own) :], start + len(own)
        retractions += kind == "retracted"
        output = RequestOutput(
            rid="r%b-1",
            start=start,
            token_ids=own,
            logprobs=-np.arange(start, end, dtype=np.float32) / 7,
            prompt_tokens=3,
            num_retractions=retractions,
            spans=[VersionSpan(version, start, end)] if len(own) else [],
        )
        more: dict[str, Any] = {}
        if kind == "two spans" and len(own) > 1:
            spans = [VersionSpan(version, start, start + 1)]
            version += 1
            more["spans"] = [*spans, VersionSpan(version, start + 1, end)]
        if kind == "top":
            more["top"] = TopLogprobs(own[:, None], output.logprobs[:, None])
        if kind == "entropies":
            more["entropies"] = output.logprobs
        if number == len(kinds) - 1:
            more["finish"] = FinishReason(type="length")
        found.append(msgspec.structs.replace(output, **more))
        start = end
    return found


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(KINDS, st.integers(1, 3)), min_size=1, max_size=30),
    st.sampled_from([{}, {"return_logprob": False}, {"return_text_in_logprobs": True}]),
    st.booleans(),
    st.sampled_from([None, "END"]),
    st.sampled_from([None, 4]),
    st.sampled_from([0, 2]),
)
def test_frames_are_those_made_in_full(
    kinds: list[tuple[str, int]],
    wants: dict[str, Any],
    has_text: bool,
    stop: str | None,
    index: int | None,
    num_given: int,
) -> None:
    ids = TOKENIZER.encode(TEXT, add_special_tokens=False)
    sampling = SamplingParams(stop=stop if has_text else None)
    wire = GenerateRequest(
        input_ids=[1, 2, 3], sampling_params=sampling, **{"return_logprob": True, **wants}
    )
    request = Request(
        rid="r%b-1",
        prompt_ids=np.arange(3, dtype=np.int32),
        sampling=sampling,
        seed=0,
        output_ids=np.array(ids[:num_given], np.int32) if num_given else None,
    )
    sample = Sample(wire, request, TOKENIZER if has_text else None, index=index, stream=True)
    labels = VersionLabels()
    writer = IncrementWriter(sample, labels)
    for (kind, _), output in zip(kinds, outputs_of(kinds, ids[num_given:], num_given), strict=True):
        if kind == "label":
            labels.name(0, "step %s")
        delta = sample.take(output)
        full = to_wire(sample.increment(delta))
        labels.relabel(full["meta_info"])
        assert writer.frame(delta) == frame(full)


def test_most_frames_are_not_made_in_full(monkeypatch: Any) -> None:
    made = []
    monkeypatch.setattr(increments, "to_wire", lambda reply: made.append(reply) or to_wire(reply))
    sampling = SamplingParams()
    wire = GenerateRequest(input_ids=[1], sampling_params=sampling, return_logprob=True)
    request = Request(rid="a", prompt_ids=np.ones(1, np.int32), sampling=sampling, seed=0)
    sample = Sample(wire, request, TOKENIZER, stream=True)
    writer = IncrementWriter(sample, VersionLabels())
    for output in outputs_of(
        [("plain", 1)] * 20, TOKENIZER.encode(TEXT, add_special_tokens=False), 0
    ):
        writer.frame(sample.take(output))
    # The first, the one that gives the form, and the last.
    assert len(made) == 3
