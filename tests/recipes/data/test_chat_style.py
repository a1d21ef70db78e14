"""What is around every prompt of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import InvalidRequest
from recipes.data.chat_style import ChatStyle, chat_style
from recipes.data.data_options import DataOptions

TEMPLATE = "{% if enable_thinking %}x{% endif %}"
USER = {"role": "user", "content": "q"}


def test_a_system_message_by_text_or_file(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_bytes("\ufeffBe brief, Zoë.\n".encode())
    for given in ("Be brief, Zoë.", f"@{tmp_path}/s.txt"):
        style = chat_style(DataOptions(system_prompt=given), None)
        assert style.led([USER]) == [{"role": "system", "content": "Be brief, Zoë."}, USER]
    assert ChatStyle().led([USER]) == [USER]


@pytest.mark.parametrize("content", [None, b"\xff\xfeB\x00"])
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "s.txt").write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"system_prompt: cannot read .*s\.txt") as caught:
        chat_style(DataOptions(system_prompt=f"@{tmp_path}/s.txt"), None)
    assert caught.value.field == "system_prompt"


def test_two_system_messages_are_one_too_many() -> None:
    with pytest.raises(InvalidRequest, match="leave --system-prompt out") as caught:
        ChatStyle(system="a").led([{"role": "system", "content": "b"}, USER])
    assert caught.value.field == "system_prompt"


def test_variables_of_the_template() -> None:
    options = DataOptions(chat_template_kwargs='{"enable_thinking": false}')
    assert chat_style(options, TEMPLATE).variables == {"enable_thinking": False}


@pytest.mark.parametrize(
    "given,template,told",
    [
        ("{enable_thinking: false}", TEMPLATE, "no JSON object"),
        ("[1]", TEMPLATE, "no JSON object"),
        ('{"enable_thinkng": false}', TEMPLATE, "does not read 'enable_thinkng'"),
        ('{"enable_thinking": false}', None, "no chat template"),
        ('{"messages": []}', TEMPLATE, "has messages"),
    ],
)
def test_variables_that_no_template_takes(given: str, template: str | None, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told) as caught:
        chat_style(DataOptions(chat_template_kwargs=given), template)
    assert caught.value.field.startswith("chat_template_kwargs")
