"""Tokenizers of every kind whose tokens have bytes, small and without a download."""

from __future__ import annotations

from collections.abc import Callable

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from rollout.text.gguf_tokenizer import build_gguf_tokenizer
from rollout.text.special_tokens import SpecialTokens
from rollout.text.tokenizer import Tokenizer

UNKNOWN, CONTROL, NORMAL, BYTE = 2, 3, 1, 6
PIECES = ["▁", "▁▁", "a", "b", "i", "s", "é", "ab", "is", "▁a", "▁is", "▁P", "aris", "▁Paris"]


def byte_level() -> Tokenizer:
    """GPT-2's bytes, some merged: "é" and the first half of an emoji are tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("Ã", "©"), ("ð", "Ł"), ("i", "s"), ("Ġ", "is")]
    vocab = {token: i for i, token in enumerate([*alphabet, *(x + y for x, y in merges)])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _with_added(backend)


def sentencepiece(*, prefixed: bool = True) -> Tokenizer:
    """BPE with byte fallback as llama.cpp writes it. prefixed: a text begins with a space that
    `decode` leaves out."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *PIECES]
    scores = [0.0] * (3 + 256) + [-9.0 + len(piece) for piece in PIECES]
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(PIECES),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_bos_token": False,
        "add_space_prefix": prefixed,
    }
    backend, special = build_gguf_tokenizer(
        {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    )
    return Tokenizer(backend, special, "{{ messages[0]['content'] }}")


def metaspace() -> Tokenizer:
    """Unigram with the Metaspace decoder, as T5 and early Llama conversions have it."""
    pieces = [("<unk>", 0.0), *((piece, -1.0) for piece in PIECES)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return _with_added(backend)


def word_piece() -> Tokenizer:
    """BERT's: words from parts that begin with "##"."""
    vocab = {token: i for i, token in enumerate(["[UNK]", "a", "is", "##is", "##b", ".", "é"])}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return _with_added(backend)


def words() -> Tokenizer:
    """Words without a decoder, which `decode` joins by spaces."""
    vocab = {token: i for i, token in enumerate(["?", "a", "is", "é", "🎉"])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return _with_added(backend)


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
    "sentencepiece_plain": lambda: sentencepiece(prefixed=False),
    "metaspace": metaspace,
    "word_piece": word_piece,
    "words": words,
}


def _with_added(backend: tokenizers.Tokenizer) -> Tokenizer:
    """With a special token, and plain ones that the alphabet of bytes holds in part or not at
    all."""
    backend.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    backend.add_tokens(["<think>", "<思>", "<à>"])
    special = SpecialTokens(eos="<|end|>", eos_ids=[])
    return Tokenizer(backend, special, "{{ messages[0]['content'] }}")
