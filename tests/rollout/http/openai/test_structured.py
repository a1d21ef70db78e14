"""What a reply must be, in every dialect: the text fits, two constraints are refused, and what is
wrong with one is told by its field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rollout.masks.grammar.requested import ANY_OBJECT
from rollout.offline import run_file
from tests.helpers.fake_executor import EOS_ID
from tests.helpers.http_app import events, run, serving
from tests.helpers.replicas import fake_config, inline
from tests.helpers.schemas import is_valid
from tests.helpers.text_models import fake_text_model
from tests.helpers.tiny_tokenizer import tiny_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "maximum": 9, "minimum": 0}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
WORDS = ["red", "green"]
LARK = 'start: "<" /[ab]{2}/ ">"'
EBNF = 'root ::= "<" [ab]{2} ">"'
TAG = {
    "type": "structural_tag",
    "format": {
        "type": "tag",
        "begin": "<",
        "content": {"type": "regex", "pattern": "[ab]{2}"},
        "end": ">",
    },
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
Fits = Callable[[str], bool]


def fits_schema(text: str) -> bool:
    return is_valid(SCHEMA, text)


def is_word(text: str) -> bool:
    return text in WORDS


def is_marked(text: str) -> bool:
    return len(text) == 4 and text[0] + text[3] == "<>" and set(text[1:3]) <= set("ab")


OPENAI: list[tuple[dict[str, Any], Fits]] = [
    ({"response_format": FORMAT}, fits_schema),
    ({"response_format": TAG}, is_marked),
    ({"structured_outputs": {"json": SCHEMA}}, fits_schema),
    ({"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}}, fits_schema),
    ({"structured_outputs": {"regex": "(red|green)"}}, is_word),
    ({"structured_outputs": {"choice": WORDS}}, is_word),
    ({"structured_outputs": {"grammar": LARK}}, is_marked),
    ({"structured_outputs": {"grammar": EBNF}}, is_marked),
    ({"structured_outputs": {"structural_tag": json.dumps(TAG)}}, is_marked),
    ({"guided_json": SCHEMA}, fits_schema),
    ({"guided_regex": "(red|green)"}, is_word),
    ({"guided_choice": WORDS}, is_word),
    ({"guided_grammar": LARK}, is_marked),
    ({"regex": "(red|green)"}, is_word),
    ({"ebnf": EBNF}, is_marked),
    ({"json_schema": SCHEMA, "response_format": {"type": "text"}}, fits_schema),
    ({"structural_tag": TAG}, is_marked),
]
NATIVE: list[tuple[dict[str, Any], Fits]] = [
    ({"sampling_params": {"json_schema": json.dumps(SCHEMA)}}, fits_schema),
    ({"sampling_params": {"regex": "(red|green)"}}, is_word),
    ({"sampling_params": {"ebnf": EBNF}}, is_marked),
    ({"sampling_params": {"structural_tag": json.dumps(TAG)}}, is_marked),
    ({"grammar": {"kind": "choice", "source": json.dumps(WORDS)}}, is_word),
    ({"grammar": {"kind": "lark", "source": LARK}}, is_marked),
]
CHAT = {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 300}
COMPLETION = {"prompt": "abc", "max_tokens": 300}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fake_text_model(tmp_path_factory.mktemp("fake"))


def test_every_field_of_openais_routes_constrains(model: str) -> None:
    async def test() -> None:
        async with serving(engine=fake_config(model)) as server:
            for fields, fits in OPENAI:
                chat = (await server.post("/v1/chat/completions", CHAT | fields)).json()
                text = (await server.post("/v1/completions", COMPLETION | fields)).json()
                for choice, found in (
                    (chat["choices"][0], chat["choices"][0]["message"]["content"]),
                    (text["choices"][0], text["choices"][0]["text"]),
                ):
                    assert fits(found), (fields, found)
                    assert choice["finish_reason"] == "stop"
                    assert choice["logprob_law"] == "model"

    run(test)


def test_any_json_object(model: str) -> None:
    async def test() -> None:
        async with serving(engine=fake_config(model)) as server:
            for fields in (
                {"response_format": {"type": "json_object"}},
                {"structured_outputs": {"json_object": True}},
                {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
                {"json_schema": ANY_OBJECT},
            ):
                body = COMPLETION | fields | {"max_tokens": 5}
                (choice,) = (await server.post("/v1/completions", body)).json()["choices"]
                assert choice["text"].startswith("{")
                (sent,) = server.link.requests[-1:]
                assert sent.grammar.kind == "json_object"

    run(test)


def test_every_field_of_the_native_dialect_constrains(model: str) -> None:
    async def test() -> None:
        async with serving(engine=fake_config(model)) as server:
            for fields, fits in NATIVE:
                sampling = {"max_new_tokens": 300, **fields.get("sampling_params", {})}
                body = {"text": "abc", **fields, "sampling_params": sampling}
                reply = (await server.post("/generate", body)).json()
                assert fits(reply["text"]), (fields, reply)
                assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS_ID}
                assert reply["meta_info"]["logprob_law"] == "model"
            plain = (await server.post("/generate", {"text": "abc"})).json()
            assert "logprob_law" not in plain["meta_info"]

    run(test)


def test_vllms_route_of_tokens(model: str) -> None:
    async def test() -> None:
        async with serving(engine=fake_config(model)) as server:
            sampling = {"max_tokens": 99, "structured_outputs": {"choice": WORDS}}
            body = {"token_ids": [1, 2], "sampling_params": sampling}
            (choice,) = (await server.post("/inference/v1/generate", body)).json()["choices"]
            assert is_word(tiny_tokenizer().decode(choice["token_ids"]))

    run(test)


def test_samples_and_items_and_streams(model: str) -> None:
    async def test() -> None:
        async with serving(engine=fake_config(model)) as server:
            body = {
                "text": ["ab", "cd"],
                "sampling_params": [
                    {"regex": "(red|green)", "max_new_tokens": 99, "n": 2},
                    {"json_schema": json.dumps(SCHEMA), "max_new_tokens": 300},
                ],
            }
            found = (await server.post("/generate", body)).json()
            assert [is_word(one["text"]) for one in found] == [True, True, False]
            assert fits_schema(found[2]["text"])
            stream = CHAT | {"stream": True, "response_format": FORMAT}
            frames = events((await server.post("/v1/chat/completions", stream)).text)
            choices = [frame["choices"][0] for frame in frames if frame]
            assert fits_schema("".join(c["delta"].get("content") or "" for c in choices))
            assert choices[-1]["logprob_law"] == "model"

    run(test)


def test_whose_the_logprobs_are(model: str) -> None:
    async def test() -> None:
        async with serving(engine=fake_config(model)) as server:
            body = COMPLETION | {"guided_choice": WORDS, "logprob_law": "masked"}
            (choice,) = (await server.post("/v1/completions", body)).json()["choices"]
            assert choice["logprob_law"] == "masked"
            assert server.link.requests[-1].logprob_law == "masked"
            native = {"input_ids": [1], "allowed_token_ids": [4, 5], "logprob_law": "masked"}
            reply = (await server.post("/generate", native)).json()
            assert reply["meta_info"]["logprob_law"] == "masked"

    run(test)


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": FORMAT, "guided_regex": "a"}, "guided_regex", "response_format"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex", "one of them"),
    ({"regex": "a", "ebnf": EBNF}, "ebnf", "regex"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "object"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format.json_schema.name",
        "missing",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "x": 1}}},
        "response_format.json_schema.x",
        "known",
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"properties": {"b": {"not": {}}}}},
            }
        },
        "response_format.json_schema.schema",
        "#/properties/b/not",
    ),
    ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml", "known"),
    ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex", "text"),
    ({"structured_outputs": {"choice": "ab"}}, "structured_outputs.choice", "list"),
    ({"guided_regex": "("}, "guided_regex", "position 0"),
    ({"guided_choice": []}, "guided_choice", "1 to"),
    ({"guided_grammar": "start: x"}, "guided_grammar", "x"),
    ({"guided_json": "{"}, "guided_json", "JSON"),
    ({"guided_json": {"enum": ["x" * 300_000]}}, "guided_json", "most is"),
    ({"ebnf": 'root ::= "a'}, "ebnf", "line 1"),
]


def test_what_is_wrong_is_told_by_its_field(model: str) -> None:
    async def test() -> None:
        async with serving(engine=fake_config(model)) as server:
            for fields, field, said in BAD:
                for path, body in (("chat/completions", CHAT), ("completions", COMPLETION)):
                    reply = await server.post(f"/v1/{path}", body | fields)
                    error = reply.json()["error"]
                    assert reply.status_code == 400, (fields, error)
                    assert (error["type"], error["field"]) == ("InvalidRequest", field), error
                    assert said in error["message"] and error["param"] == field, error
            native = {"text": ["a", "b"], "sampling_params": [{}, {"regex": "("}]}
            error = (await server.post("/generate", native)).json()["error"]
            assert error["field"] == "[1].sampling_params.regex"
            assert error["message"].startswith("item 1: sampling_params.regex: ")
            assert server.link.requests == []

    run(test)


def test_a_grammar_that_leads_nowhere_is_the_fault_of_its_field(model: str) -> None:
    regex = {"regex": "(red|green)"}
    bodies: list[tuple[str, dict[str, Any], str]] = [
        (path, body | fields, field)
        for path, body in (("chat/completions", CHAT), ("completions", COMPLETION))
        for fields, field in (
            ({"guided_regex": regex["regex"]}, "guided_regex"),
            ({"structured_outputs": regex}, "structured_outputs.regex"),
        )
    ]

    async def test() -> None:
        async with serving(engine=fake_config(model)) as server:
            for path, body, field in bodies:
                long = {"min_tokens": 50, "max_tokens": 60}
                reply = await server.post(f"/v1/{path}", body | long)
                error = reply.json()["error"]
                assert (reply.status_code, error["param"]) == (400, field), error
                stream = await server.post(f"/v1/{path}", body | long | {"stream": True})
                assert [f["error"]["param"] for f in events(stream.text) if f and "error" in f] == [
                    field
                ]
            sampling = regex | {"min_new_tokens": 50, "max_new_tokens": 60}
            reply = await server.post("/generate", {"text": "a", "sampling_params": sampling})
            error = reply.json()["error"]
            assert (reply.status_code, error["field"]) == (400, "sampling_params.regex"), error
            assert error["type"] == "UnmetConstraint"

    run(test)


@pytest.mark.parametrize("name", ["disable_any_whitespace", "whitespace_pattern"])
def test_options_that_are_not_served_are_refused_where_they_are_set(model: str, name: str) -> None:
    async def test() -> None:
        async with serving(engine=fake_config(model)) as server:
            for value, status in ((None, 200), (False, 200), ("x", 400)):
                options = {"regex": "(red|green)", name: value}
                reply = await server.post(
                    "/v1/completions", COMPLETION | {"structured_outputs": options}
                )
                assert reply.status_code == status
            assert reply.json()["error"]["type"] == "UnsupportedOption"

    run(test)


def test_a_model_without_a_tokenizer() -> None:
    async def test() -> None:
        async with serving(ids_only=True) as server:
            body = {"input_ids": [1], "sampling_params": {"regex": "a"}}
            error = (await server.post("/generate", body)).json()["error"]
            assert (error["type"], error["field"]) == ("InvalidRequest", "grammar")

    run(test)


def test_lines_of_a_file(model: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    regexes = ["(red|green)", "("]
    lines = [
        {"text": "ab", "sampling_params": {"regex": regex, "max_new_tokens": 99}}
        for regex in regexes
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with inline(model) as replica:
        run_file(replica, tiny_tokenizer(), source, target, seed=0)
    first, second = map(json.loads, target.read_text().splitlines())
    assert is_word(first["text"])
    assert second["error"]["field"] == "sampling_params.regex"
