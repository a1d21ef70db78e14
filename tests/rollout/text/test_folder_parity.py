"""Tokenizer folders give the ids and the chat text of transformers, or are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from engine.errors import CheckpointError, InvalidRequest
from rollout.text.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.tokenizer_folders import write_folder

TEXTS = [
    "Hello world, the quick 12345 naïve naïve",
    "  two  spaces\n\n\ttabs \n ends ",
    "<|im_start|>user\nhi <|im_end|> <|tool|><think> x </think><|late|><|later|><|more|>",
    "<s> a </s><unk><|image|><|new_sep|><|old|><|endoftext|>",
    "def f(x):\n    return 'don't' 👩‍👩‍👧 日本",
    "",
]
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": " be brief "},
    {"role": "user", "content": "the world 12"},
    {"role": "assistant", "content": "so:", "reasoning": "hm", "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": {"x": "é<"}}}]},
    {"role": "tool", "content": "ab"},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
NUM_FOLDERS = 200
QUICK = 25
LEAST_SERVED = 0.9


def compare(ours: Tokenizer, theirs: Any, folder: Path) -> None:
    """Ids, chat text and end tokens of one folder."""
    for text in TEXTS:
        for special in (True, False):
            expected = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.encode(text, add_special_tokens=special) == expected, (text, special)
    for tools in (None, TOOLS):
        for prompt in (True, False):
            compare_chat(ours, theirs, tools, prompt)
    assert ours.vocab_size == len(theirs)
    assert ours.bos_id == theirs.bos_token_id
    assert set(ours.eos_ids) == declared_ends(theirs, folder)
    assert ours.special_tokens == theirs.special_tokens_map


def compare_chat(ours: Tokenizer, theirs: Any, tools: Any, prompt: bool) -> None:
    options = {"tools": tools, "add_generation_prompt": prompt}
    try:
        expected = theirs.apply_chat_template(CHAT, tokenize=False, **options)
    except ValueError:
        with pytest.raises(InvalidRequest, match="no chat template"):
            ours.render_chat(CHAT, **options)
        return
    assert ours.render_chat(CHAT, **options) == expected
    ids = theirs.apply_chat_template(CHAT, tokenize=True, return_dict=False, **options)
    assert ours.apply_chat_template(CHAT, **options) == ids


def declared_ends(theirs: Any, folder: Path) -> set[int]:
    """The tokenizer's EOS, and what the generation config says or else the configuration."""
    found = {theirs.eos_token_id} - {None}
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        listed = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if listed is not None:
            return found | set(listed if isinstance(listed, list) else [listed])
    return found


def served(seed: int, tmp_path: Path) -> bool:
    """Whether the folder of `seed` is served; then it equals transformers'."""
    folder = write_folder(seed, tmp_path / str(seed))
    try:
        ours = load_tokenizer(folder)
    except CheckpointError as error:
        assert error.field and error.field != "model"
        assert str(folder) in error.message and error.field in error.message
        return False
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
    except TypeError:
        # A null that the class there does not take, and here is the default.
        return True
    compare(ours, theirs, folder)
    return True


@pytest.mark.parametrize("first", range(0, QUICK, 5))
def test_some_folders_equal_transformers(first: int, tmp_path: Path) -> None:
    assert sum(served(seed, tmp_path) for seed in range(first, first + 5)) >= 2


@pytest.mark.slow
def test_two_hundred_folders_equal_transformers(tmp_path: Path) -> None:
    count = sum(served(seed, tmp_path) for seed in range(1000, 1000 + NUM_FOLDERS))
    assert count >= LEAST_SERVED * NUM_FOLDERS


def write_gemma(folder: Path, model_type: str, **changes: Any) -> None:
    """As transformers writes one; `changes` replace keys of tokenizer_config.json."""
    vocab = {token: i for i, token in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"))}
    for piece in (*(f"<0x{byte:02X}>" for byte in range(256)), *"▁helowrdtquick12", "he", "▁t"):
        vocab.setdefault(piece, len(vocab))
    merges = [("h", "e"), ("▁", "t")]
    tokenizer = transformers.GemmaTokenizer(vocab=vocab, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "eos_token_id": 1}))


@pytest.mark.parametrize("model_type", ["gemma3_text", "gemma3", "llama"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"add_bos_token": True, "add_eos_token": False},
        {"add_bos_token": False},
        {"tokenizer_class": "GemmaTokenizerFast", "bos_token": None},
        {"tokenizer_class": None},
        {"unk_token": {"__type": "AddedToken", "content": "<unk>"}},
    ],
)
def test_gemma_folders_equal_transformers(
    changes: dict[str, Any], model_type: str, tmp_path: Path
) -> None:
    write_gemma(tmp_path, model_type, **changes)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    compare(load_tokenizer(tmp_path), theirs, tmp_path)
