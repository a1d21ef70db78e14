"""Tokenizer keys of GGUF files: followed, without effect, or refused by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import pre_tokenizers

from engine.errors import CheckpointError, ModelError
from rollout.text.gguf_keys import HARMLESS, NEUTRAL, READ
from rollout.text.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.gguf_writer import add_key

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
CHAT = [{"role": "user", "content": "ab"}]


def byte_level() -> dict[str, Any]:
    tokens = [*ALPHABET, "ab", "<|bos|>", "<|eos|>"]
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [NORMAL] * (len(tokens) - 2) + [CONTROL, CONTROL],
        "merges": ["a b"],
        "bos_token_id": len(tokens) - 2,
        "eos_token_id": len(tokens) - 1,
    }


def sentencepiece() -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "ab"]
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-1.0, -2.0, -3.0, -4.0],
        "token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def load(folder: Path, keys: dict[str, Any], **others: Any) -> Tokenizer:
    """The tokenizer of a file that the gguf library writes; None leaves a key out."""
    path = folder / "x.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    written = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    for key, value in {**written, **others}.items():
        if value is not None:
            add_key(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return load_tokenizer(path)


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("bos", [True, False, None])
@pytest.mark.parametrize("eos", [True, False, None])
def test_flags_add_their_tokens(make: Any, bos: bool | None, eos: bool | None, tmp_path: Path):
    keys = make()
    tokenizer = load(tmp_path, {**keys, "add_bos_token": bos, "add_eos_token": eos})
    plain = tokenizer.encode("ab", add_special_tokens=False)
    first = [keys["bos_token_id"]] if (make is sentencepiece if bos is None else bos) else []
    assert tokenizer.encode("ab") == [*first, *plain, *([keys["eos_token_id"]] if eos else [])]


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_keys_that_change_nothing_are_passed_over(make: Any, tmp_path: Path) -> None:
    plain = load(tmp_path, make()).encode("ab a")
    inert = dict.fromkeys(HARMLESS, 3) | {key: values[0] for key, values in NEUTRAL.items()}
    inert |= {"some_new_key": 0, "some_new_flag": False, "precompiled_charsmap": None}
    other = {"tokenizer.huggingface.json": "{}", "general.name": "x"}
    assert load(tmp_path, {**make(), **inert}, **other).encode("ab a") == plain


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("add_sep_token", True),
        ("remove_extra_whitespaces", True),
        ("escape_whitespaces", False),
        ("precompiled_charsmap", [1, 2]),
        ("normalizer.lowercase", True),
        ("some_new_key", 1),
        ("some_new_names", ["a"]),
        ("model", "t5"),
        ("pre", "default"),
    ],
)
def test_a_key_that_is_not_followed_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load(tmp_path, {**byte_level(), key: value})
    assert caught.value.field == f"tokenizer.ggml.{key}"
    assert caught.value.field in caught.value.message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("add_bos_token", 1),
        ("add_bos_token", "true"),
        ("bos_token_id", 100_000),
        ("eos_token_id", "2"),
        ("eot_token_id", 100_000),
        ("token_type", [1, 1]),
        ("token_type", ["x"]),
        ("tokens", [1, 2]),
        ("merges", ["ab"]),
        ("merges", ["a zz"]),
        ("merges", [1]),
        ("pre", 3),
    ],
)
def test_a_value_of_another_kind_is_named(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, {**byte_level(), key: value})
    assert caught.value.field == f"tokenizer.ggml.{key}"


def test_a_flag_for_a_token_that_is_not_there_is_named(tmp_path: Path) -> None:
    for role in ("bos", "eos"):
        for absent in (None, 2**32 - 1):
            keys = {**byte_level(), f"add_{role}_token": True, f"{role}_token_id": absent}
            with pytest.raises(CheckpointError, match=f"add_{role}_token"):
                load(tmp_path, keys)


def test_scores_of_another_number_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.scores"):
        load(tmp_path, {**sentencepiece(), "scores": [0.0]})


def test_templates_of_a_file(tmp_path: Path) -> None:
    named = {"tokenizer.chat_template": "d", "tokenizer.chat_template.tool_use": "t"}
    tokenizer = load(tmp_path, byte_level(), **{"tokenizer.chat_templates": ["tool_use"], **named})
    assert tokenizer.render_chat(CHAT) == "d"
    assert tokenizer.render_chat(CHAT, tools=[{}]) == "t"
    with pytest.raises(CheckpointError, match=r"tokenizer\.chat_template"):
        load(tmp_path, byte_level(), **{"tokenizer.chat_template": 7})


@pytest.mark.parametrize("odd", [True, -1, 7, math.inf, "x", [1], [0.5], ["a"], ["a b"]])
@pytest.mark.parametrize("key", sorted({*READ, *HARMLESS, *NEUTRAL}))
def test_an_odd_value_is_followed_or_named(key: str, odd: Any, tmp_path: Path) -> None:
    for make in (byte_level, sentencepiece):
        try:
            load(tmp_path, {**make(), key: odd}).encode("ab")
        except ModelError as error:
            assert error.field.startswith("tokenizer.ggml.") and error.field in error.message


def test_no_key_has_two_fates() -> None:
    assert not READ & HARMLESS
    assert not READ & NEUTRAL.keys()
    assert not HARMLESS & NEUTRAL.keys()
