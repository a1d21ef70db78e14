"""Files of a tokenizer folder that are broken or odd: an error that names file and key."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.auto import tokenization_auto

from engine.errors import CheckpointError, InvalidRequest
from rollout.text.folder.pipeline import read_pipeline
from rollout.text.folder.tokens import ROLES
from rollout.text.tokenizer import load_tokenizer
from tests.helpers.tiny_tokenizer import TEMPLATE, tiny_tokenizer

ODD: list[Any] = [
    None, True, 7, -1, 2.5, 10**30, "", "x", "\ud800", [], [None], [2, None], ["x"], {}, {"a": 1},
    [{"name": "default"}], {"content": 7}, {"content": "<z>", "special": "yes"},
]  # fmt: skip


def documents() -> dict[str, dict[str, Any]]:
    """A folder with every file and key that is read, by file name."""
    token = {"content": "<|eos|>", "lstrip": False, "special": True}
    return {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "auto_map": None,
            "added_tokens_decoder": {"299": token},
            "bos_token": "<|bos|>",
            "eos_token": {"__type": "AddedToken", **token},
            "pad_token": None,
            "image_token": "<|im_start|>",
            "extra_special_tokens": ["<|im_end|>"],
            "additional_special_tokens": None,
            "split_special_tokens": False,
            "fast_tokenizer_files": ["tokenizer.json"],
            "init_inputs": [],
            "fix_mistral_regex": False,
            "chat_template": [{"name": "default", "template": TEMPLATE}],
            "add_bos_token": None,
        },
        "special_tokens_map.json": {"eos_token": token, "additional_special_tokens": ["<|bos|>"]},
        "added_tokens.json": {"<|im_end|>": 258},
        "generation_config.json": {"eos_token_id": [299, 258]},
        "config.json": {"model_type": "llama", "eos_token_id": 299, "tokenizer_class": None},
    }


def write(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer(template=None).write_hf(folder)
    (folder / "special_tokens_map.json").unlink()
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))


def mutations(source: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path of a key, document in which it is odd or missing) for every key at any depth."""
    keys = source if isinstance(source, dict) else range(len(source))
    for key in keys:
        for odd in ODD:
            changed = copy.copy(source)
            changed[key] = odd
            yield (*path, key), changed
        if isinstance(source, dict):
            yield (*path, key), {k: v for k, v in source.items() if k != key}
        if isinstance(source[key], dict | list):
            for deeper, inner in mutations(source[key], (*path, key)):
                changed = copy.copy(source)
                changed[key] = inner
                yield deeper, changed


@pytest.mark.slow
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", list(documents()))
def test_an_odd_value_of_any_key_is_read_or_named(name: str, legacy: bool, tmp_path: Path) -> None:
    files = documents()
    if legacy:
        del files["tokenizer_config.json"]["added_tokens_decoder"]
    write(tmp_path, files)
    refused = 0
    for path, changed in mutations(files[name]):
        (tmp_path / name).write_text(json.dumps(changed))
        try:
            load_tokenizer(tmp_path).encode("a<|im_end|>b")
        except CheckpointError as error:
            refused += 1
            first = error.field.split(".")[0].split("[")[0]
            # A token that one key declares may be one that another declares elsewhere.
            known = {str(path[0]), "added_tokens_decoder", "extra_special_tokens"}
            assert first in known, (path, error)
            assert str(tmp_path) in error.message
    assert refused > 0 or (name, legacy) in {
        ("special_tokens_map.json", False),
        ("added_tokens.json", False),
    }


@pytest.mark.slow
def test_an_odd_value_in_the_tokenizer_itself_is_read_or_named(tmp_path: Path) -> None:
    write(tmp_path, {"config.json": {"model_type": "llama"}})
    path = tmp_path / "tokenizer.json"
    source = json.loads(path.read_text())
    source["model"]["vocab"] = dict(list(source["model"]["vocab"].items())[:3])
    source["added_tokens"] = [
        {**token, "id": 3 + i} for i, token in enumerate(source["added_tokens"][:2])
    ]
    served = 0
    for class_name in ("PreTrainedTokenizerFast", "LlamaTokenizer"):
        config = {"tokenizer_class": class_name, **dict.fromkeys(ROLES), "eos_token": "<|bos|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        for where, changed in mutations(source):
            path.write_text(json.dumps(changed))
            try:
                load_tokenizer(tmp_path).encode("a<|bos|>")
            except (CheckpointError, InvalidRequest) as error:
                assert "tokenizer" in error.message, where
            else:
                served += 1
    assert served > 50


@pytest.mark.parametrize("damage", ["cut", "bom", "latin", "list", "nested", "folder"])
@pytest.mark.parametrize("name", [*documents(), "tokenizer.json", "chat_template.jinja"])
def test_a_damaged_file_is_named(name: str, damage: str, tmp_path: Path) -> None:
    files = documents()
    del files["tokenizer_config.json"]["added_tokens_decoder"]
    write(tmp_path, files)
    path = tmp_path / name
    whole = path.read_bytes() if path.exists() else b"{{ messages }}"
    harmless = name == "chat_template.jinja" and damage not in ("latin", "folder")
    if damage == "folder":
        path.unlink(missing_ok=True)
        path.mkdir()
    else:
        damaged = {
            "cut": whole[: len(whole) // 2],
            "bom": b"\xef\xbb\xbf" + whole,
            "latin": whole + b'\xe9"',
            "list": b"[1]",
            "nested": b'{"a":' * 100_000,
        }
        path.write_bytes(damaged[damage])
    if harmless:
        load_tokenizer(tmp_path)
        return
    with pytest.raises(CheckpointError, match=name) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.field == "model"


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"tokenizer_class": "BertTokenizerFast"}, "tokenizer_class"),
        ({"auto_map": {"AutoTokenizer": ["a.B", None]}, "tokenizer_class": "B"}, "auto_map"),
        ({"fix_mistral_regex": True}, "fix_mistral_regex"),
        ({"init_inputs": ["x"]}, "init_inputs"),
        ({"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}, "fast_tokenizer_files"),
        ({"eos_token": ["<|eos|>"]}, "eos_token"),
        ({"added_tokens_decoder": {"7": {"content": "<|eos|>"}}}, "added_tokens_decoder"),
        ({"chat_template": [{"name": "../up", "template": "x"}]}, "chat_template"),
    ],
)
def test_what_would_give_other_ids_is_refused(
    config: dict[str, Any], key: str, tmp_path: Path
) -> None:
    write(tmp_path, {"tokenizer_config.json": config})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.field == key


def test_a_decoder_without_bytes_names_its_file(tmp_path: Path) -> None:
    write(tmp_path, {})
    path = tmp_path / "tokenizer.json"
    source = json.loads(path.read_text())
    source["decoder"] = {"type": "BPEDecoder", "suffix": "</w>"}
    path.write_text(json.dumps(source))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: decoder") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.field == "decoder"


@pytest.mark.parametrize("nested", [False, True])
def test_a_token_that_a_template_adds_without_an_id_is_named(nested: bool, tmp_path: Path) -> None:
    tiny_tokenizer(add_bos=True).write_hf(tmp_path)
    path = tmp_path / "tokenizer.json"
    source = json.loads(path.read_text())
    source["post_processor"]["special_tokens"] = {}
    if nested:
        processors = [source["post_processor"]]
        source["post_processor"] = {"type": "Sequence", "processors": processors}
    path.write_text(json.dumps(source))
    with pytest.raises(CheckpointError, match=r"<\|bos\|>") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.field == "post_processor.special_tokens"


def test_every_class_of_transformers_is_known(tmp_path: Path) -> None:
    write(tmp_path, {})
    text = (tmp_path / "tokenizer.json").read_text()
    mapped = {name for name in tokenization_auto.TOKENIZER_MAPPING_NAMES.values() if name}
    exported = {n for n in dir(transformers) if n.endswith(("Tokenizer", "TokenizerFast"))}
    as_they_are = {"PreTrainedTokenizer", "PreTrainedTokenizerFast", "AutoTokenizer"}
    as_they_are |= {"TokenizersBackend", "MistralCommonBackend"}
    rebuilt = {"LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer", "GemmaTokenizer"}
    names = (mapped | exported) - as_they_are
    for name in sorted(name for name in names if name.removesuffix("Fast") not in rebuilt):
        with pytest.raises(CheckpointError, match=name.removesuffix("Fast")):
            read_pipeline(tmp_path, {"tokenizer_class": name}, {}, text)


def test_a_tokenizer_that_draws_lots_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {})
    path = tmp_path / "tokenizer.json"
    source = json.loads(path.read_text())
    source["model"]["dropout"] = 0.1
    path.write_text(json.dumps(source))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.field == "model.dropout"
