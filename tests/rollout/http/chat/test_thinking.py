"""How much to think, in the variables of templates."""

from __future__ import annotations

import pytest

from engine.errors import UnsupportedOption
from rollout.http.chat.thinking import thinking_variables
from rollout.text.chat_template import ChatTemplate

SWITCH = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
V31 = "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
LEVEL = "Reasoning: {{ reasoning_effort }}"


@pytest.mark.parametrize(
    ("effort", "source", "expected"),
    [
        ("high", SWITCH, {"enable_thinking": True}),
        ("none", SWITCH, {"enable_thinking": False}),
        ("medium", V31, {"thinking": True}),
        ("low", LEVEL, {"reasoning_effort": "low"}),
        ("none", LEVEL + SWITCH, {"enable_thinking": False}),
    ],
)
def test_the_variable_that_a_template_reads(
    effort: str, source: str, expected: dict[str, object]
) -> None:
    assert thinking_variables(effort, ChatTemplate(source, {}).variables, field="f") == expected


@pytest.mark.parametrize(
    ("effort", "source"),
    [
        ("high", "thinking enable_thinking {{ message.thinking }} {{ message['thinking'] }}"),
        ("none", LEVEL),
        ("low", "{% for m in messages %}{% set thinking = m.thinking %}{{ thinking }}{% endfor %}"),
        ("low", "{{ messages }}"),
    ],
)
def test_a_template_without_one(effort: str, source: str) -> None:
    with pytest.raises(UnsupportedOption) as caught:
        thinking_variables(effort, ChatTemplate(source, {}).variables, field="f")
    assert caught.value.field == "f"
