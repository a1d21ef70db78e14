"""Rebuild a tokenizer from the metadata of a GGUF file.

GGUF stores the vocabulary, the merges and the *name* of the pre-tokeniser
(`tokenizer.ggml.pre`, named by llama.cpp); the splitting rules behind a name are those
of the model's original `tokenizer.json`.
"""

from __future__ import annotations

from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from engine.errors import CheckpointError, ModelError
from rollout.text.special_tokens import SpecialTokens, wrap_with_special

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

_DIGIT_NAMES = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
_GPT2_NAMES = ("gpt-2", "gpt2", "mpt", "olmo", "jais", "phi-2")
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe")
_QWEN2_NAMES = ("qwen2", "deepseek-r1-qwen", "megrez", "kormo")


def build_gguf_tokenizer(metadata: dict[str, Any]) -> tuple[Tokenizer, SpecialTokens]:
    """The tokenizer and role tokens that `tokenizer.ggml.*` keys describe.

    Byte-level BPE ("gpt2") and SentencePiece BPE ("llama") are built; another
    `tokenizer.ggml.model` or pre-tokeniser raises ModelError naming the key.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _require(metadata, "tokens")
    if kind == "gpt2":
        backend = _byte_level_bpe(metadata, tokens)
    elif kind == "llama":
        backend = _sentencepiece_bpe(metadata, tokens)
    else:
        raise ModelError(
            f"tokenizer.ggml.model is {kind!r}; 'gpt2' and 'llama' are supported. "
            "Use the model's Hugging Face folder instead",
            field="tokenizer.ggml.model",
        )
    _add_tokens(backend, tokens, metadata.get("tokenizer.ggml.token_type", []))
    special = _special_tokens(metadata, tokens)
    wrap_with_special(
        backend,
        special,
        bos=metadata.get("tokenizer.ggml.add_bos_token", _adds_bos(metadata)),
        eos=metadata.get("tokenizer.ggml.add_eos_token", False),
    )
    return backend, special


def _require(metadata: dict[str, Any], name: str) -> Any:
    key = f"tokenizer.ggml.{name}"
    if key not in metadata:
        raise CheckpointError(f"the GGUF file has no {key}", field=key)
    return metadata[key]


def _adds_bos(metadata: dict[str, Any]) -> bool:
    if metadata.get("tokenizer.ggml.model") == "llama":
        return True
    return metadata.get("tokenizer.ggml.pre") in _LLAMA3_NAMES


def _byte_level_bpe(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    name = _require(metadata, "pre")
    merges = [tuple(merge.split(" ", 1)) for merge in _require(metadata, "merges")]
    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=name in _LLAMA3_NAMES,
        )
    )
    if name in _QWEN2_NAMES:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(name)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    if name in _GPT2_NAMES:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in _DIGIT_NAMES:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if name in _LLAMA3_NAMES or name in _QWEN2_NAMES:
        pattern = _LLAMA3_SPLIT if name in _LLAMA3_NAMES else _QWEN2_SPLIT
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, to_bytes])
    known = ", ".join(sorted({*_GPT2_NAMES, *_DIGIT_NAMES, *_LLAMA3_NAMES, *_QWEN2_NAMES}))
    raise ModelError(
        f"tokenizer.ggml.pre is {name!r}; known are {known}. "
        "Use the model's Hugging Face folder instead",
        field="tokenizer.ggml.pre",
    )


def _sentencepiece_bpe(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    """SentencePiece's BPE keeps scores, not merges: a pair may merge when its union is a
    piece, and the union of the higher score merges first."""
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = _merges_from_scores(vocab, _require(metadata, "scores"))
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces: list[normalizers.Normalizer] = [normalizers.Prepend("▁")] if prefixed else []
    backend.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback()]
    steps.append(decoders.Fuse())
    if prefixed:
        steps.append(decoders.Strip(" ", left=1))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges_from_scores(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    merges: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece, index in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                merges.append((-scores[index], vocab[left], vocab[right], (left, right)))
    merges.sort()
    return [pair for *_, pair in merges]


def _add_tokens(backend: Tokenizer, tokens: list[str], types: list[int]) -> None:
    control = [t for t, kind in zip(tokens, types, strict=False) if kind in (_CONTROL, _UNKNOWN)]
    plain = [t for t, kind in zip(tokens, types, strict=False) if kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in plain])


def _special_tokens(metadata: dict[str, Any], tokens: list[str]) -> SpecialTokens:
    def token(role: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{role}_token_id")
        return None if index is None or not 0 <= index < len(tokens) else tokens[index]

    keys = (f"tokenizer.ggml.{role}_token_id" for role in ("eos", "eot", "eom"))
    ends = [metadata[key] for key in keys if key in metadata]
    return SpecialTokens(
        bos=token("bos"),
        eos=token("eos"),
        unk=token("unknown"),
        pad=token("padding"),
        eos_ids=list(dict.fromkeys(ends)),
    )
