"""Tokenizers of GGUF files: pre-tokenizers, merges, special and end tokens."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from engine.errors import CheckpointError, ModelError, ModelNotFound
from engine.protocol import SamplingParams
from rollout.text.detokenizer import Detokenizer
from rollout.text.gguf_metadata import read_gguf_metadata
from rollout.text.tokenizer import load_tokenizer
from tests.helpers.gguf_writer import write_gguf_metadata

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6


def byte_level(**changes: Any) -> dict[str, Any]:
    """Metadata of a byte-level tokenizer with digit merges up to three digits."""
    merged = ["12", "123", "1234", "Ġ1", "ab"]
    merges = ["1 2", "12 3", "123 4", "Ġ 1", "a b"]
    tokens = [*ALPHABET, *merged, "<|eos|>", "<|bos|>", "<user>"]
    types = [NORMAL] * (len(ALPHABET) + len(merged)) + [CONTROL, CONTROL, USER]
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": types,
        "merges": merges,
        "eos_token_id": tokens.index("<|eos|>"),
        "bos_token_id": tokens.index("<|bos|>"),
        **changes,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in metadata.items() if v is not None}


def pieces(metadata: dict[str, Any], folder: Path, text: str) -> list[str]:
    """Each token of `text`, as text."""
    tokenizer = load_tokenizer(write_gguf_metadata(folder / "m.gguf", metadata))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    return [tokenizer.decode([i], skip_special_tokens=False) for i in ids]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["a", " 1", "2", "3", "4", "5"]),
        ("smollm", ["a", " ", "1", "2", "3", "4", "5"]),
        ("qwen2", ["a", " ", "1", "2", "3", "4", "5"]),
    ],
)
def test_digits_split_as_the_pre_tokenizer_says(
    tmp_path: Path, pre: str, expected: list[str]
) -> None:
    merges = {"merges": ["Ġ 1", "1 2", "12 3", "123 4", "a b"]}
    assert pieces(byte_level(pre=pre, **merges), tmp_path, "a 12345") == expected


def test_llama3_splits_digits_by_three_and_adds_its_bos(tmp_path: Path) -> None:
    found = pieces(byte_level(pre="llama-bpe"), tmp_path, "a12341")
    assert found == ["<|bos|>", "a", "123", "4", "1"]


@pytest.mark.parametrize("pre", ["dbrx", "smaug-bpe"])
def test_of_llama3_some_names_take_the_words_alone(tmp_path: Path, pre: str) -> None:
    assert pieces(byte_level(pre=pre), tmp_path, "a12341") == ["a", "123", "4", "1"]
    words = byte_level(pre=pre, merges=["1 2"])
    assert pieces(words, tmp_path, "ab123") == ["a", "b", "12", "3"]


def test_llama3_takes_whole_words_without_merges(tmp_path: Path) -> None:
    tokens = [*ALPHABET, "word", "<|bos|>"]
    metadata = byte_level(
        pre="llama-bpe", tokens=tokens, merges=["x y"], token_type=None, eos_token_id=None,
        bos_token_id=None,
    )  # fmt: skip
    metadata["tokenizer.ggml.tokens"] = [*tokens, "xy"]
    assert pieces(metadata, tmp_path, "word") == ["word"]


def test_flag_decides_about_the_bos(tmp_path: Path) -> None:
    assert pieces(byte_level(add_bos_token=True), tmp_path, "a") == ["<|bos|>", "a"]
    off = byte_level(pre="llama-bpe", add_bos_token=False)
    assert pieces(off, tmp_path, "a") == ["a"]


def test_control_tokens_are_special_and_user_tokens_are_not(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gguf_metadata(tmp_path / "m.gguf", byte_level()))
    ids = tokenizer.encode("a<user>b<|eos|>")
    assert len(ids) == 4
    assert tokenizer.decode(ids) == "a<user>b"
    assert tokenizer.eos_ids == [ids[-1]]


def test_end_of_turn_ids_are_eos_too(tmp_path: Path) -> None:
    metadata = byte_level(eot_token_id=3, eom_token_id=4)
    tokenizer = load_tokenizer(write_gguf_metadata(tmp_path / "m.gguf", metadata))
    assert tokenizer.eos_ids[1:] == [3, 4]


def sentencepiece(**changes: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary: bytes, characters, and three pieces with scores."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, "▁", "a", "b", "c", "ab", "bc", "▁a"]
    scores = [0.0] * (3 + 256) + [-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * 7
    metadata = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types}
    metadata |= {"bos_token_id": 1, "eos_token_id": 2, **changes}
    return {f"tokenizer.ggml.{k}": v for k, v in metadata.items()}


def test_sentencepiece_merges_the_best_score_first(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gguf_metadata(tmp_path / "m.gguf", sentencepiece()))
    vocab = sentencepiece()["tokenizer.ggml.tokens"]
    assert [vocab[i] for i in tokenizer.encode("abc")] == ["<s>", "▁a", "bc"]
    assert [vocab[i] for i in tokenizer.encode("b ab")] == ["<s>", "▁", "b", "▁", "ab"]
    assert tokenizer.decode(tokenizer.encode("abc b")) == "abc b"


def test_sentencepiece_falls_back_to_bytes(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gguf_metadata(tmp_path / "m.gguf", sentencepiece()))
    ids = tokenizer.encode("é", add_special_tokens=False)
    assert ids[1:] == [3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode(ids) == "é"


def test_sentencepiece_text_comes_whole_from_the_detokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gguf_metadata(tmp_path / "m.gguf", sentencepiece()))
    ids = tokenizer.encode("ab c é bc  a🎉")
    detokenizer = Detokenizer(tokenizer, SamplingParams())
    texts = [detokenizer.feed([token]).text for token in ids]
    assert "".join(texts) + detokenizer.finish().text == tokenizer.decode(ids)


def test_sentencepiece_without_the_space_prefix(tmp_path: Path) -> None:
    metadata = sentencepiece(add_space_prefix=False, add_bos_token=False)
    tokenizer = load_tokenizer(write_gguf_metadata(tmp_path / "m.gguf", metadata))
    vocab = metadata["tokenizer.ggml.tokens"]
    assert [vocab[i] for i in tokenizer.encode("abc")] == ["a", "bc"]
    assert tokenizer.decode(tokenizer.encode(" abc")) == " abc"


@pytest.mark.parametrize(
    ("changes", "error", "field"),
    [
        ({"model": "t5"}, ModelError, "tokenizer.ggml.model"),
        ({"model": None}, ModelError, "tokenizer.ggml.model"),
        ({"pre": "never-heard-of"}, ModelError, "tokenizer.ggml.pre"),
        ({"pre": None}, CheckpointError, "tokenizer.ggml.pre"),
        ({"tokens": None}, CheckpointError, "tokenizer.ggml.tokens"),
        ({"merges": None}, CheckpointError, "tokenizer.ggml.merges"),
    ],
)
def test_what_cannot_be_rebuilt_is_named(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], field: str
) -> None:
    path = write_gguf_metadata(tmp_path / "m.gguf", byte_level(**changes))
    with pytest.raises(error) as caught:
        load_tokenizer(path)
    assert caught.value.field == field


def test_metadata_of_every_type(tmp_path: Path) -> None:
    metadata = {"a": "é", "b": True, "c": 7, "d": 0.5, "e": [1, 2], "f": ["x", ""], "g": [True]}
    assert read_gguf_metadata(write_gguf_metadata(tmp_path / "m.gguf", metadata)) == metadata


def test_every_cut_of_a_file_is_a_typed_error(tmp_path: Path) -> None:
    path = write_gguf_metadata(tmp_path / "m.gguf", {"a": "text", "b": [1, 2], "c": ["x"]})
    data = path.read_bytes()
    for end in range(len(data)):
        path.write_bytes(data[:end])
        with pytest.raises(CheckpointError):
            read_gguf_metadata(path)


def test_files_that_are_not_gguf(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        read_gguf_metadata(tmp_path / "absent.gguf")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04 and more bytes than a header")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        read_gguf_metadata(other)
    old = write_gguf_metadata(tmp_path / "old.gguf", {}, version=1)
    with pytest.raises(CheckpointError, match="version 1"):
        read_gguf_metadata(old)
