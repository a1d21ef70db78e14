"""Conversations as tokens: what the assistant says is learnt, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.errors import InvalidRequest
from recipes.data.chat_style import ChatStyle
from recipes.tuning.examples import Example, ExampleWriter
from tests.helpers.char_model import char_tokenizer
from tests.helpers.tiny_tokenizer import EOS_ID, TEMPLATE, tiny_tokenizer

CHAT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]
ENDED = TEMPLATE.replace("<|im_end|>\n", "<|eos|>\n")
FORGETS = TEMPLATE.replace(
    "{{ message['content'] }}",
    "{% if message.role != 'assistant' or loop.last %}{{ message['content'] }}{% endif %}",
)
"""What the assistant said is written in the last turn alone, as reasoning is by some templates."""
THINKS = TEMPLATE.replace(
    "<|im_start|>assistant\n{% endif",
    "<|im_start|>assistant\n<think>\n{% if quick %}</think>{% endif %}{% endif",
)
"""Asks for a reply in another way than it writes one."""


def writer(template: str | None = TEMPLATE, **options: Any) -> ExampleWriter:
    style = options.pop("style", ChatStyle())
    return ExampleWriter(tokenizer=tiny_tokenizer(template=template), style=style, **options)


def learnt(example: Example, found: ExampleWriter) -> list[str]:
    """The texts of the learnt stretches."""
    edges = np.flatnonzero(np.diff(np.r_[False, example.learnt, False]))
    pieces = np.split(example.token_ids, edges)[1::2]
    return [found.tokenizer.decode(piece, skip_special_tokens=False) for piece in pieces]


def test_every_turn_of_the_assistant_is_learnt() -> None:
    found = writer()
    example = found.example(CHAT)
    assert learnt(example, found) == ["two<|im_end|>\n", "four<|im_end|>\n"]
    whole = found.tokenizer.render_chat(CHAT, add_generation_prompt=False)
    assert found.tokenizer.decode(example.token_ids, skip_special_tokens=False) == whole
    assert example.num_learnt == 5 + 6


def test_a_turn_is_learnt_to_the_token_that_ends_a_reply() -> None:
    found = writer(ENDED)
    example = found.example(CHAT)
    assert learnt(example, found) == ["two<|eos|>", "four<|eos|>"]
    assert example.token_ids[-2] == EOS_ID and not example.learnt[-1]
    assert found.ends_turns() and not writer().ends_turns()


def test_the_last_turn_alone() -> None:
    found = writer(train_on="last")
    example = found.example(CHAT)
    assert learnt(example, found) == ["four<|im_end|>\n"]
    trajectory = example.trajectory()
    prompt = found.tokenizer.apply_chat_template(CHAT[:3])
    assert trajectory.prompt_ids.tolist() == prompt, "what a rollout is asked with"
    assert example.kept().tolist() == [True] * 6


def test_the_style_of_a_run_is_in_every_example() -> None:
    found = writer(THINKS, style=ChatStyle(system="s"), train_on="last")
    with pytest.raises(InvalidRequest, match="begins message 4 in another way"):
        found.example(CHAT)
    found = writer("{{ mood }}" + TEMPLATE, style=ChatStyle(system="s", variables={"mood": "!"}))
    text = found.tokenizer.decode(found.example(CHAT).token_ids, skip_special_tokens=False)
    assert text.startswith("!<|im_start|>system\ns<|im_end|>")


def test_a_template_that_writes_earlier_turns_anew_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match=r"the turns before message 3 anew.*--train-on last"):
        writer(FORGETS).example(CHAT)
    found = writer(FORGETS, train_on="last")
    assert learnt(found.example(CHAT), found) == ["four<|im_end|>\n"]
    assert learnt(writer(FORGETS).example(CHAT[:2]), found) == ["two<|im_end|>\n"]


def test_a_model_without_a_template_answers_on_the_line() -> None:
    found = ExampleWriter(tokenizer=char_tokenizer(), style=ChatStyle())
    chat = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    example = found.example(
        [*chat, {"role": "user", "content": "2+2="}, {**chat[1], "content": "4"}]
    )
    assert found.tokenizer.decode(example.token_ids) == "1+1= 2\n2+2= 4\n"
    assert learnt(example, found) == [" 2\n", " 4\n"]
    assert found.ends_turns()


def test_a_token_over_the_seam_is_not_learnt_as_one() -> None:
    """The tokens before a reply are those that a rollout is asked with, whatever follows."""

    class Pairs:
        """Two characters a token, from the start."""

        chat_template = None
        eos_ids: list[int] = []

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return [
                ord(text[i]) * 256 + ord(text[i + 1 : i + 2] or "\0")
                for i in range(0, len(text), 2)
            ]

    chat = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "d"}]
    found = ExampleWriter(tokenizer=Pairs(), style=ChatStyle())  # type: ignore[arg-type]
    example = found.example(chat)
    prompt = Pairs().encode("abc")
    assert example.token_ids.tolist() == [*prompt, *Pairs().encode(" d\n")]
    assert example.first == len(prompt)


def test_a_chat_without_a_question_has_nothing_to_be_asked_with() -> None:
    with pytest.raises(InvalidRequest, match="no tokens for this model before"):
        writer("{{ messages[1:] | map(attribute='content') | join }}").example(CHAT[:2])
