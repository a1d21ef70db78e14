"""What stands between two turns, by the templates of several families."""

from __future__ import annotations

import pytest

from rollout.text.chat_template import ChatTemplate
from rollout.turns.bridge import behind_stop, bridge
from rollout.turns.probe import TemplateTurns, probe
from tests.helpers.chat_templates import QWEN25, TOLD_BY_NONE
from tests.helpers.tiny_tokenizer import TEMPLATE

DROPS_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].lstrip() }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
RENAMES = "{% for m in messages %}[{{ messages | length }}]{{ m.content }}\n{% endfor %}"


def render_of(source: str):
    template = ChatTemplate(source, {})

    def render(messages, generation):
        return template.write(messages, {"add_generation_prompt": generation})

    return render


USER, TOOL = {"role": "user", "content": "b"}, {"role": "tool", "content": "4"}


@pytest.mark.parametrize(
    ("source", "after", "wanted"),
    [
        (TEMPLATE, [USER], "<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"),
        (
            DROPS_THINKING,
            [USER],
            "<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n<think>\n",
        ),
        (
            QWEN25,
            [TOOL],
            "<|im_end|>\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
    ],
)
def test_the_bridge_is_what_the_template_writes(source: str, after: list, wanted: str) -> None:
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    assert bridge(render_of(source), asked, after) == wanted
    assert behind_stop(wanted, "<|im_end|>") == wanted[len("<|im_end|>") :]
    assert behind_stop(wanted, "<|eos|>") is None


def test_a_stand_in_is_no_word_of_the_messages() -> None:
    said = [{"role": "user", "content": "Zq7Xk and Zq7Xkq"}]
    found = bridge(render_of(TEMPLATE), said, said)
    assert found is not None and found.count("Zq7Xk") == 2


def test_a_template_that_refuses_the_stand_in_has_no_bridge() -> None:
    refuses = "{{ raise_exception('no') if messages | length > 1 }}{{ messages[0].content }}"
    assert bridge(render_of(refuses), [], [USER]) is None
    assert bridge(render_of("{{ messages[0].content }}"), [], [USER]) is None


def test_the_probe_tells_what_becomes_of_old_turns() -> None:
    assert probe(render_of(TEMPLATE)) == TemplateTurns(
        append_only=True, keeps_thinking=True, separator_kept=True, turn_end="<|im_end|>\n"
    )
    thinking = probe(render_of(DROPS_THINKING))
    assert not thinking.keeps_thinking and thinking.turn_end == "<|im_end|>\n"
    assert not probe(render_of(RENAMES)).append_only
    assert probe(render_of(TOLD_BY_NONE)).append_only is False
