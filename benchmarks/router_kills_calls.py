"""Requests of `benchmarks/router_kills.py` in every dialect, and what their replies say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

NUM_TOKENS = 96
_STOP = ["zq", "~~", "Kx"]
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 40}, "size": {"type": "integer"}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
_FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": _SCHEMA}}
Same = Callable[[bytes], Any]


@dataclass(frozen=True)
class Call:
    """One request. same: what of its reply does not depend on who answered."""

    path: str
    body: dict[str, Any]
    same: Same


def call(number: int) -> Call:
    """The request of a number; the kinds take turns."""
    kinds = (_native, _native_stream, _completions, _chat, _chat_stream, _responses, _messages)
    more = (_completions_stream, _responses_stream, _messages_stream, _vllm, _native_json)
    return ((*kinds, *more, _native_samples))[number % 13](number)


NUM_KINDS = 13


def _text(number: int) -> str:
    return f"request {number * 7919 % 1000:03} of a fleet"


def _ids(number: int) -> list[int]:
    return [number % 90, 3, 5, number // 90, 17, 11]


def _sampling(number: int, **more: Any) -> dict[str, Any]:
    return {"max_new_tokens": NUM_TOKENS, "temperature": 0.9, "sampling_seed": number} | more


def _plain(number: int, **more: Any) -> dict[str, Any]:
    return {"max_tokens": NUM_TOKENS, "temperature": 0.9, "seed": number, "model": "tiny"} | more


def _native(number: int) -> Call:
    penalties = {"frequency_penalty": 0.3, "presence_penalty": 0.2, "repetition_penalty": 1.1}
    sampling = _sampling(number, **penalties, min_new_tokens=40)
    body = {"input_ids": _ids(number), "sampling_params": sampling, "return_logprob": True}
    return Call("/generate", body, native)


def _native_stream(number: int) -> Call:
    sampling = _sampling(number, top_p=0.95, repetition_penalty=1.05, ignore_eos=True)
    body = {"text": _text(number), "sampling_params": sampling, "stream": True}
    return Call("/generate", body, lambda reply: native(events(reply)[-1]))


def _native_samples(number: int) -> Call:
    sampling = _sampling(number, n=4, stop=_STOP, top_k=80)
    return Call("/generate", {"text": _text(number), "sampling_params": sampling}, native)


def _native_json(number: int) -> Call:
    sampling = _sampling(number, json_schema=json.dumps(_SCHEMA))
    return Call("/generate", {"text": _text(number), "sampling_params": sampling}, native)


def _completions(number: int) -> Call:
    body = _plain(number, prompt=_ids(number), n=4, min_tokens=30, frequency_penalty=0.5)
    return Call("/v1/completions", body | {"stop": _STOP, "logprobs": 1}, choices)


def _completions_stream(number: int) -> Call:
    body = _plain(number, prompt=_text(number), n=2, stream=True, ignore_eos=True)
    return Call("/v1/completions", body, streamed_choices)


def _chat(number: int) -> Call:
    body = _plain(number, messages=_talk(number), n=4, presence_penalty=0.4, logprobs=True)
    return Call("/v1/chat/completions", body, choices)


def _chat_stream(number: int) -> Call:
    body = _plain(number, messages=_talk(number), stream=True, response_format=_FORMAT)
    return Call("/v1/chat/completions", body, streamed_choices)


def _responses(number: int) -> Call:
    body = {"model": "tiny", "input": _text(number), "max_output_tokens": NUM_TOKENS}
    more = {"seed": number, "frequency_penalty": 0.4, "store": False, "ignore_eos": True}
    return Call("/v1/responses", body | more, response)


def _responses_stream(number: int) -> Call:
    body = _responses(number).body | {"stream": True}

    def same(reply: bytes) -> Any:
        last = events(reply)[-1]
        assert last["type"] in ("response.completed", "response.incomplete"), last
        return response(last["response"])

    return Call("/v1/responses", body, same)


def _messages(number: int) -> Call:
    # The dialect has no seed: with temperature 0 there is nothing to draw.
    body = {"model": "tiny", "messages": _talk(number), "max_tokens": NUM_TOKENS}
    return Call("/v1/messages", body | {"temperature": 0.0, "stop_sequences": _STOP}, message)


def _messages_stream(number: int) -> Call:
    def same(reply: bytes) -> Any:
        found = events(reply)
        assert found[-1]["type"] == "message_stop", found[-1]
        texts = [e["delta"].get("text", "") for e in found if e["type"] == "content_block_delta"]
        ends = [e["delta"]["stop_reason"] for e in found if e["type"] == "message_delta"]
        return ["".join(texts), ends]

    return Call("/v1/messages", _messages(number).body | {"stream": True}, same)


def _vllm(number: int) -> Call:
    sampling = {"max_tokens": NUM_TOKENS, "temperature": 0.9, "seed": number, "n": 2}
    sampling |= {"repetition_penalty": 1.1, "min_tokens": 20}
    body = {"token_ids": _ids(number), "sampling_params": sampling}
    return Call("/inference/v1/generate", body, choices)


def _talk(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": _text(number)}]


def events(reply: bytes) -> list[Any]:
    """Data of a stream's events; it has to have its end."""
    lines = [line for line in reply.splitlines() if line.startswith(b"data: ")]
    found = [line.removeprefix(b"data: ") for line in lines]
    assert found, reply[:200]
    return [json.loads(data) for data in found if data != b"[DONE]"]


def native(reply: Any) -> Any:
    """Of /generate."""
    found = _read(reply)
    return [
        [one["text"], one["output_ids"], one["meta_info"]["finish_reason"], _logprobs(one)]
        for one in (found if isinstance(found, list) else [found])
    ]


def _logprobs(one: dict[str, Any]) -> Any:
    told = one["meta_info"].get("output_token_logprobs") or []
    return [round(value[0], 3) for value in told]


def choices(reply: Any) -> Any:
    """Of OpenAI's completions and vLLM's dialect."""
    return [
        [
            one["index"],
            one.get("text"),
            one.get("token_ids"),
            (one.get("message") or {}).get("content"),
            one["finish_reason"],
        ]
        for one in _read(reply)["choices"]
    ]


def streamed_choices(reply: bytes) -> Any:
    """The same, of a stream."""
    assert reply.rstrip().endswith(b"data: [DONE]"), reply[-300:]
    found: dict[int, list[Any]] = {}
    for event in events(reply):
        for one in event["choices"]:
            whole = found.setdefault(one["index"], ["", None])
            whole[0] += one.get("text") or (one.get("delta") or {}).get("content") or ""
            whole[1] = one["finish_reason"] or whole[1]
    assert all(end for _, end in found.values()), found
    return found


def response(reply: Any) -> Any:
    """Of /v1/responses."""
    found = _read(reply)
    texts = [part["text"] for item in found["output"] for part in item.get("content") or []]
    return [texts, found["status"]]


def message(reply: Any) -> Any:
    """Of /v1/messages."""
    found = _read(reply)
    return [[part["text"] for part in found["content"]], found["stop_reason"]]


def _read(reply: Any) -> Any:
    return json.loads(reply) if isinstance(reply, bytes) else reply
