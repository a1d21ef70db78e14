"""A reward model reads each reply once, by its own template, behind exactly one BOS."""

from __future__ import annotations

import pytest

from recipes.rewards.base import Failed
from recipes.rewards.reward_models.model_chat import ModelChat
from tests.helpers.reward_items import item
from tests.helpers.tiny_tokenizer import BOS_ID, TEMPLATE, tiny_tokenizer

WITH_BOS = "{{ bos_token }}" + TEMPLATE


@pytest.mark.parametrize(
    "add_bos, template, wanted",
    [
        (False, TEMPLATE, 0),
        (False, WITH_BOS, 1),
        (True, TEMPLATE, 1),
        (True, WITH_BOS, 1),
        (True, "{{ bos_token }}" + WITH_BOS, 1),
        (True, None, 1),
        (False, None, 0),
    ],
)
def test_there_is_one_bos_and_none_where_the_model_has_none(
    add_bos: bool, template: str | None, wanted: int
) -> None:
    ids = ModelChat(tiny_tokenizer(add_bos=add_bos, template=template)).ids(item("4"))
    assert not isinstance(ids, Failed)
    assert ids.tolist().count(BOS_ID) == wanted
    assert (int(ids[0]) == BOS_ID) is (wanted == 1)


def test_the_chat_is_the_templates_with_the_reply_as_its_last_turn() -> None:
    tokenizer = tiny_tokenizer()
    ids = ModelChat(tokenizer).ids(item("4"))
    assert not isinstance(ids, Failed)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text == "<|im_start|>user\n2+2=<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"


def test_without_a_template_it_is_what_the_policy_wrote() -> None:
    tokenizer = tiny_tokenizer(template=None)
    ids = ModelChat(tokenizer).ids(item("4"))
    assert not isinstance(ids, Failed)
    assert tokenizer.decode(ids) == "2+2=4\n"


def test_what_is_too_long_or_does_not_fit_the_template_fails_alone() -> None:
    chat = ModelChat(tiny_tokenizer(), 40)
    good, bad = chat.ids(item("4")), chat.ids(item("4" * 40))
    assert not isinstance(good, Failed)
    assert isinstance(bad, Failed) and bad.kind == "too_long" and "40" in bad.reason
    refuses = tiny_tokenizer(template="{{ raise_exception('no such role') }}")
    found = ModelChat(refuses).ids(item("4"))
    assert isinstance(found, Failed) and found.kind == "raised" and "no such role" in found.reason
