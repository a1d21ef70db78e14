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
from rollout.text.gguf_keys import check_tokenizer_keys, listed, switch, token_id
from rollout.text.special_tokens import SpecialTokens, wrap_with_special

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

_DIGIT_NAMES = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
_GPT2_NAMES = ("gpt-2", "gpt2", "mpt", "olmo", "jais", "phi-2")
# Whole words come before merges, and a BOS before the text where no flag says otherwise.
_LLAMA3_OWN = ("llama-bpe", "llama3", "llama-v3", "falcon3")
_LLAMA3_NAMES = (*_LLAMA3_OWN, "dbrx", "smaug-bpe")
_QWEN2_NAMES = ("qwen2", "deepseek-r1-qwen", "megrez", "kormo")


def build_gguf_tokenizer(metadata: dict[str, Any]) -> tuple[Tokenizer, SpecialTokens]:
    """The tokenizer and role tokens that `tokenizer.ggml.*` keys describe.

    Byte-level BPE ("gpt2") and SentencePiece BPE ("llama") are built; another
    `tokenizer.ggml.model` or pre-tokeniser raises ModelError naming the key.
    """
    check_tokenizer_keys(metadata)
    kind = metadata.get("tokenizer.ggml.model")
    tokens = listed(metadata, "tokens", str, None)
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
    _add_tokens(backend, tokens, _token_types(metadata, len(tokens)))
    special = _special_tokens(metadata, tokens)
    bos = _added(metadata, "bos", special.bos)
    wrap_with_special(
        backend,
        special,
        bos=_adds_bos(metadata) if bos is None else bos,
        eos=bool(_added(metadata, "eos", special.eos)),
    )
    return backend, special


def _added(metadata: dict[str, Any], role: str, token: str | None) -> bool | None:
    """Whether the file says that every text gets this token."""
    flag = switch(metadata, f"add_{role}_token")
    if flag and token is None:
        key = f"tokenizer.ggml.{role}_token_id"
        raise CheckpointError(
            f"tokenizer.ggml.add_{role}_token is true, but {key} names no token", field=key
        )
    return flag


def _token_types(metadata: dict[str, Any], num_tokens: int) -> list[int]:
    if "tokenizer.ggml.token_type" not in metadata:
        return []
    return listed(metadata, "token_type", int, num_tokens)


def _adds_bos(metadata: dict[str, Any]) -> bool:
    if metadata.get("tokenizer.ggml.model") == "llama":
        return True
    return metadata.get("tokenizer.ggml.pre") in _LLAMA3_OWN


def _byte_level_bpe(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre")
    if not isinstance(name, str):
        key = "tokenizer.ggml.pre"
        raise CheckpointError(f"the GGUF file has no name of a pre-tokenizer in {key}", field=key)
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = _merges(vocab, listed(metadata, "merges", str, None))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=name in _LLAMA3_OWN))
    if name in _QWEN2_NAMES:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(name)
    backend.decoder = decoders.ByteLevel()
    return backend


def _merges(vocab: dict[str, int], lines: list[str]) -> list[tuple[str, str]]:
    merges = []
    for line in lines:
        # The left part may be a space itself.
        cut = line.find(" ", 1)
        left, right = line[:cut], line[cut + 1 :]
        if not all(part in vocab for part in (left, right, left + right)):
            raise CheckpointError(
                f"tokenizer.ggml.merges has {line!r:.80}, which joins no two tokens to a third",
                field="tokenizer.ggml.merges",
            )
        merges.append((left, right))
    return merges


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
    merges = _merges_from_scores(vocab, listed(metadata, "scores", float, len(tokens)))
    unknown = tokens[token_id(metadata, "unknown", len(tokens)) or 0] if tokens else None
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefixed = switch(metadata, "add_space_prefix") is not False
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
        index = token_id(metadata, role, len(tokens))
        return None if index is None else tokens[index]

    ends = [token_id(metadata, role, len(tokens)) for role in ("eos", "eot", "eom")]
    return SpecialTokens(
        bos=token("bos"),
        eos=token("eos"),
        unk=token("unknown"),
        pad=token("padding"),
        eos_ids=list(dict.fromkeys(end for end in ends if end is not None)),
    )
