"""Chat templates: what they may use, and the mistakes they report."""

import pytest

from engine.errors import InvalidRequest
from rollout.text.chat_template import ChatTemplate

USER = [{"role": "user", "content": "<b> & é"}]


def render(source: str, messages: list = USER, **variables: object) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **variables)


def test_special_tokens_variables_and_generation_prompt() -> None:
    source = "{{ bos_token }}{{ mood }}{% if add_generation_prompt %}go{% endif %}"
    assert render(source, mood="calm") == "<s>calmgo"
    assert render(source, mood="calm", add_generation_prompt=False) == "<s>calm"


def test_blocks_are_trimmed_as_templates_expect() -> None:
    assert (
        render("{% for m in messages %}\n  {% if true %}\nx\n  {% endif %}\n{% endfor %}") == "x\n"
    )


def test_tojson_keeps_html_and_unicode() -> None:
    tools = [{"name": "f", "text": "<b> é"}]
    assert render("{{ tools | tojson }}", tools=tools) == '[{"name": "f", "text": "<b> é"}]'
    assert render("{{ tools[0] | tojson(indent=1) }}", tools=tools).startswith('{\n "name"')


def test_loop_controls_generation_blocks_and_date() -> None:
    source = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render(source) == "01"
    assert render("a{% generation %}b{{ messages|length }}{% endgeneration %}c") == "ab1c"
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == 10


def test_raise_exception_becomes_invalid_request() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    ("messages", "field"),
    [([], "messages"), (["hi"], "messages[0]"), ([*USER, {"content": "x"}], "messages[1]")],
)
def test_messages_without_a_shape_are_refused(messages: list, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render("x", messages)
    assert caught.value.field == field


def test_missing_key_of_a_message_is_the_callers_mistake() -> None:
    with pytest.raises(InvalidRequest, match="messages do not fit"):
        render("{{ messages[0]['content'] + messages[0]['name'] }}")


def test_sandbox_refuses_attributes_of_python() -> None:
    with pytest.raises(InvalidRequest):
        render("{{ messages.__class__.__mro__[1].__subclasses__() }}")


def test_template_that_does_not_parse() -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate("{% if %}", {})
    assert caught.value.field == "chat_template"
