"""Which parsers serve a model: told by its chat template, named by the command line."""

from __future__ import annotations

import pytest

from engine.errors import InvalidRequest
from rollout.parsers.formats import REASONING_PARSERS, TOOL_PARSERS, select_format
from tests.helpers.call_templates import CALL_TEMPLATES
from tests.helpers.chat_templates import LLAMA3, PARTS, QWEN25

QWEN3 = QWEN25 + "{{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is false }}"
R1 = "{% set content = message['content'].split('</think>')[-1] %}"


@pytest.mark.parametrize("kind", CALL_TEMPLATES)
def test_a_template_tells_how_calls_are_written(kind: str) -> None:
    name, template = CALL_TEMPLATES[kind]
    assert select_format(template).tool_parser == name


@pytest.mark.parametrize(
    "template,expected",
    [
        (QWEN25, ("hermes", None)),
        (QWEN3, ("hermes", "qwen3")),
        (LLAMA3, ("llama3", None)),
        (PARTS, (None, None)),
        (R1, (None, "deepseek-r1")),
        ("{# writes <tool_call> arguments, </think> #}", (None, None)),
        ("Use [func_name1(params_name1=params_value1)]", ("pythonic", None)),
        ("'[TOOL_CALLS]' ~ name ~ '[ARGS]' '[THINK]'", ("mistral-args", "mistral")),
        ("<arg_key> <think> </think>", ("glm", "glm")),
        ("<tool_calls> <tool_sep> <arg_key>", (None, None)),
        ("<function={{ name }}>{{ arguments }}</function>", (None, None)),
        ("", (None, None)),
        (None, (None, None)),
    ],
)
def test_the_marks_of_templates(
    template: str | None, expected: tuple[str | None, str | None]
) -> None:
    found = select_format(template)
    assert (found.tool_parser, found.reasoning_parser) == expected


def test_the_command_line_overrides_the_template() -> None:
    found = select_format(QWEN3, "llama3_json", "none")
    assert (found.tool_parser, found.reasoning_parser) == ("llama3", None)
    found = select_format(QWEN3, "none", "deepseek_r1")
    assert (found.tool_parser, found.reasoning_parser) == (None, "deepseek-r1")


@pytest.mark.parametrize("option,table", [(1, TOOL_PARSERS), (2, REASONING_PARSERS)])
def test_an_unknown_name_is_told_the_known_ones(option: int, table: dict[str, object]) -> None:
    names: list[str | None] = [None, None, None]
    names[option] = "nothing"
    with pytest.raises(InvalidRequest) as caught:
        select_format(*names)
    assert caught.value.field == ("", "--tool-parser", "--reasoning-parser")[option]
    assert all(name in str(caught.value) for name in (*table, "none"))


def test_special_tokens_are_kept_where_the_parsers_look_for_them() -> None:
    assert select_format("", "mistral").keeps_special_tokens
    assert select_format("", None, "mistral").keeps_special_tokens
    assert not select_format("", "hermes", "qwen3").keeps_special_tokens
    known = {"</tool_call>": 5}
    assert select_format("", "hermes", special_token_id=known.get).keeps_special_tokens
    assert not select_format("", "mistral", special_token_id=known.get).keeps_special_tokens


def test_what_ends_thinking() -> None:
    assert select_format(R1).thinking_end_text == "</think>"
    assert select_format("", None, "mistral").thinking_end_text == "[/THINK]"
    assert select_format("").thinking_end_text is None
