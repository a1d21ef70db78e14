"""Requests as JSON: every field is read, and every mistake names its own."""

import re

import pytest

from engine.errors import InvalidRequest, UnsupportedOption
from rollout.requests.wire import parse_request


def test_a_full_object_is_read() -> None:
    wire = parse_request(
        b'{"input_ids": [1, 2], "rid": "x", "return_logprob": true, "logprob_start_len": 0,'
        b' "return_entropy": true,'
        b' "sampling_params": {"n": 2, "stop": ["a"], "logit_bias": {"5": -1.5}}}'
    )
    assert wire.input_ids == [1, 2]
    assert wire.sampling_params.logit_bias == {5: -1.5}
    assert wire.sampling_params.max_new_tokens == 128
    assert wire.return_entropy


@pytest.mark.parametrize(
    ("line", "error", "field"),
    [
        ("{", InvalidRequest, ""),
        ("\xff", InvalidRequest, ""),
        ("[]", InvalidRequest, ""),
        ('{"txt": "a"}', InvalidRequest, "txt"),
        ('{"text": 5}', InvalidRequest, "text"),
        ('{"text": "a", "sampling_params": {"top": 1}}', InvalidRequest, "sampling_params.top"),
        ('{"sampling_params": {"top_p": "x"}}', InvalidRequest, "sampling_params.top_p"),
        ('{"input_ids": [1, "a"]}', InvalidRequest, "input_ids[1]"),
        ('{"lora_path": "x"}', UnsupportedOption, "lora_path"),
        ('{"sampling_params": {"regex": 5}}', InvalidRequest, "sampling_params.regex"),
        ('{"grammar": {"kind": "bnf", "source": ""}}', InvalidRequest, "grammar.kind"),
    ],
)
def test_mistakes_name_their_field(line: str, error: type[Exception], field: str) -> None:
    with pytest.raises(error) as caught:
        parse_request(line.encode("latin-1"))
    assert type(caught.value) is error
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ('{"txt": "a"}', "did you mean text?"),
        ('{"max_new_tokens": 3}', "did you mean sampling_params.max_new_tokens?"),
        ('{"regex": "x"}', "did you mean sampling_params.regex?"),
        ('{"temprature": 1}', "did you mean sampling_params.temperature?"),
        ('{"sampling_params": {"temprature": 1}}', "did you mean sampling_params.temperature?"),
        ('{"sampling_params": {"hold_at": 3}}', "write hold_at beside sampling_params"),
        ('{"custom_id": "x"}', "leave it out"),
    ],
)
def test_an_unknown_field_comes_with_the_one_that_was_meant(line: str, meant: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(meant)):
        parse_request(line)


def test_a_null_is_no_field() -> None:
    line = '{"text": "a", "rid": null, "lora_path": null, "sampling_params": {"n": null}}'
    assert parse_request(line) == parse_request('{"text": "a"}')
    assert parse_request('{"text": "a", "sampling_params": null}') == parse_request('{"text": "a"}')


def test_what_asks_for_nothing_is_no_field() -> None:
    """Lines of a file may be what a client would send a server, its defaults written out."""
    plain = parse_request('{"text": "a", "sampling_params": {"n": 2}}')
    line = (
        '{"text": "a", "return_hidden_states": false, "lora_path": null, "image_data": [],'
        ' "log_metrics": true, "routing_key": "k",'
        ' "sampling_params": {"n": 2, "regex": "", "json_schema": null, "custom_params": {}}}'
    )
    assert parse_request(line) == plain
    with pytest.raises(UnsupportedOption) as caught:
        parse_request(line.replace("false", "true"))
    assert caught.value.field == "return_hidden_states"
