"""From a request to its sequences: token ids, samples, seeds and stop tokens."""

from typing import Any

import pytest

from engine.errors import ContextTooLong, InvalidRequest
from engine.protocol import GenerateRequest, ReplicaState, SamplingParams
from rollout.requests.expand import expand
from rollout.requests.sample_ids import shown
from rollout.requests.seeds import derive_seed
from tests.helpers.replicas import inline
from tests.helpers.tiny_tokenizer import BOS_ID, EOS_ID, IM_END_ID, ids_of, tiny_tokenizer

TOKENIZER = tiny_tokenizer(add_bos=True)


@pytest.fixture(scope="module")
def state() -> ReplicaState:
    with inline() as replica:
        return replica.state()


def wire(sampling: dict[str, Any] | None = None, **fields: Any) -> GenerateRequest:
    if "text" not in fields and "input_ids" not in fields:
        fields["text"] = "ab"
    return GenerateRequest(sampling_params=SamplingParams(**(sampling or {})), **fields)


def test_text_is_encoded_with_its_bos(state: ReplicaState) -> None:
    (request,) = expand(wire(rid="x"), TOKENIZER, state, 1)
    assert request.prompt_ids.tolist() == [BOS_ID, *ids_of("ab")]
    assert (request.rid, request.group, request.stream) == ("x", "x", False)


def test_ids_go_through_unchanged_and_need_no_tokenizer(state: ReplicaState) -> None:
    (request,) = expand(wire(input_ids=[5, 6]), None, state, 1)
    assert request.prompt_ids.tolist() == [5, 6]
    assert request.stop_ids == [EOS_ID]


def test_samples_share_a_group_and_have_their_own_seeds(state: ReplicaState) -> None:
    requests = expand(wire({"n": 4, "sampling_seed": 9}, rid="x"), TOKENIZER, state, 1)
    assert [shown(r.rid) for r in requests] == ["x-0", "x-1", "x-2", "x-3"]
    assert {r.group for r in requests} == {"x"}
    assert [r.seed for r in requests] == [derive_seed(9, i) for i in range(4)]
    assert {r.sampling.n for r in requests} == {1}


def test_seed_of_the_request_rules_over_the_default(state: ReplicaState) -> None:
    first = expand(wire({"sampling_seed": 9}), TOKENIZER, state, 1)[0].seed
    assert first == expand(wire({"sampling_seed": 9}), TOKENIZER, state, 2)[0].seed
    assert (
        expand(wire(), TOKENIZER, state, 1)[0].seed != expand(wire(), TOKENIZER, state, 2)[0].seed
    )


def test_fresh_ids_differ(state: ReplicaState) -> None:
    rids = {expand(wire(), TOKENIZER, state, 1)[0].rid for _ in range(10)}
    assert len(rids) == 10


def test_stop_tokens(state: ReplicaState) -> None:
    (request,) = expand(wire({"stop_token_ids": [5, EOS_ID]}), TOKENIZER, state, 1)
    assert sorted(request.stop_ids) == [5, EOS_ID]
    (request,) = expand(wire({"ignore_eos": True, "stop_token_ids": [5]}), TOKENIZER, state, 1)
    assert request.stop_ids == [5]


def test_stop_string_written_as_a_special_token_is_a_stop_token(state: ReplicaState) -> None:
    sampling = {"stop": ["<|im_end|>", "END"], "ignore_eos": True}
    (request,) = expand(wire(sampling), TOKENIZER, state, 1)
    assert request.stop_ids == [IM_END_ID]
    assert request.sampling.stop == ["END"]
    assert request.stream
    (request,) = expand(wire({"stop": "<|im_end|>"}), TOKENIZER, state, 1)
    assert request.sampling.stop is None
    assert not request.stream


def test_logprob_fields_count_only_when_asked_for(state: ReplicaState) -> None:
    fields = {"top_logprobs_num": 3, "logprob_start_len": 1}
    (request,) = expand(wire(**fields), TOKENIZER, state, 1)
    assert (request.top_logprobs, request.prompt_logprob_start) == (0, -1)
    (request,) = expand(wire(return_logprob=True, **fields), TOKENIZER, state, 1)
    assert (request.top_logprobs, request.prompt_logprob_start) == (3, 1)


def test_every_sample_has_the_kv_policy_asked_for(state: ReplicaState) -> None:
    wire = GenerateRequest(input_ids=[1], sampling_params=SamplingParams(n=2), kv_policy="fresh")
    assert [r.kv_policy for r in expand(wire, None, state, 0)] == ["fresh", "fresh"]


def test_entropy_is_asked_for_apart_from_logprobs(state: ReplicaState) -> None:
    requests = expand(wire({"n": 2}, return_entropy=True), TOKENIZER, state, 1)
    assert [request.entropy for request in requests] == [True, True]
    assert not expand(wire(return_logprob=True), TOKENIZER, state, 1)[0].entropy


def test_salt_and_extra_key_keep_callers_apart(state: ReplicaState) -> None:
    def salt(cache_salt: str, extra_key: str) -> str:
        request = wire(cache_salt=cache_salt, extra_key=extra_key)
        return expand(request, TOKENIZER, state, 1)[0].salt

    salts = {salt(*pair) for pair in [("a", "bc"), ("ab", "c"), ("abc", ""), ("", "abc"), ("", "")]}
    assert len(salts) == 5


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (wire(text="a", input_ids=[1]), "text, input_ids"),
        (GenerateRequest(), "text, input_ids"),
        (wire({"n": 0}), "n"),
        (wire(input_ids=[]), "input_ids"),
        (wire(input_ids=[1, 4000]), "input_ids"),
        (wire(input_ids=[-1]), "input_ids"),
        (wire(input_ids=[2**40]), "input_ids"),
        (wire({"temperature": -1.0}), "temperature"),
        (wire({"temperature": float("nan")}), "temperature"),
        (wire({"min_new_tokens": 9, "max_new_tokens": 3}), "min_new_tokens"),
        (wire({"stop": [""]}), "stop"),
        (wire({"stop_token_ids": [999]}), "stop_token_ids"),
        (wire(return_logprob=True, logprob_start_len=50), "logprob_start_len"),
        (wire(return_logprob=True, top_logprobs_num=-1), "top_logprobs_num"),
    ],
)
def test_mistakes_name_the_field_of_the_wire(
    state: ReplicaState, request_: GenerateRequest, field: str
) -> None:
    with pytest.raises(InvalidRequest, match=field.split(",")[0]) as caught:
        expand(request_, TOKENIZER, state, 1)
    assert caught.value.field == field


def test_too_long_a_prompt(state: ReplicaState) -> None:
    with pytest.raises(ContextTooLong) as caught:
        expand(wire(text="a" * 600), TOKENIZER, state, 1)
    assert caught.value.field == "text"


def test_text_without_tokens_or_tokenizer(state: ReplicaState) -> None:
    with pytest.raises(InvalidRequest, match="no tokens"):
        expand(wire(text=""), tiny_tokenizer(), state, 1)
    with pytest.raises(InvalidRequest, match="without a tokenizer"):
        expand(wire(text="a"), None, state, 1)
    with pytest.raises(InvalidRequest, match="stop strings need a tokenizer"):
        expand(wire({"stop": "a"}, input_ids=[1]), None, state, 1)
