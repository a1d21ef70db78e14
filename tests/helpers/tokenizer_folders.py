"""Tokenizer folders as they come from the hub, drawn at random: no two are alike.

`write_folder(seed, folder)` writes one. What varies: the model (byte-level BPE, SentencePiece-like
BPE with byte fallback, WordLevel, Unigram), its pre-tokenizer and post-processor, the class and
model type named, and where and how special tokens, chat templates and end tokens are declared.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

WORDS = ["the", "hello", "world", "quick", "naive", "user", "12", "123", "def", "return", "ab"]
SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|tool|>"]
TEMPLATE = (
    "{{ bos_token if bos_token is defined else '' }}{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if 'content' in message %}{{ message['content'] | trim }}{% else %}(none){% endif %}"
    "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_TOOLS = "{% for tool in tools or [] %}<|tool|>{{ tool | tojson(indent=2) }}{% endfor %}"
OTHERS = "{{ pad_token }}|{{ sep_token }}|{{ image_token }}|{{ unk_token }}|"


def write_folder(seed: int, folder: Path) -> Path:
    """Write the folder of `seed`: the same one for the same seed."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    backend = _backend(rng)
    config = _config(rng, backend)
    _declare(rng, backend, config, folder)
    _templates(rng, config, folder)
    _model(rng, folder, backend)
    backend.save(str(folder / "tokenizer.json"))
    if rng.random() < 0.95:
        _write(folder / "tokenizer_config.json", config)
    return folder


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=path.name != "config.json"), "utf-8")


def _backend(rng: random.Random) -> tokenizers.Tokenizer:
    make = rng.choice([_byte_level, _byte_level, _byte_level, _sentencepiece, _words, _unigram])
    backend = make(rng)
    flags = {"normalized": False, "special": True}
    backend.add_special_tokens([AddedToken(token, **flags) for token in SPECIAL])
    if rng.random() < 0.4:
        strip = {"lstrip": rng.random() < 0.5, "rstrip": rng.random() < 0.5}
        backend.add_tokens([AddedToken("<think>", normalized=rng.random() < 0.5, **strip)])
    style = rng.choice(["none", "bos", "both", "file"])
    ids = {token: backend.token_to_id(token) for token in SPECIAL}
    if style == "bos" or style == "both":
        end = " <|eos|>" if style == "both" else ""
        backend.post_processor = processors.TemplateProcessing(
            single=f"<|bos|> $A{end}",
            pair=f"<|bos|> $A{end} $B:1",
            special_tokens=list(ids.items()),
        )
    elif style == "file":
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    if rng.random() < 0.15:
        backend.enable_truncation(4)
    if rng.random() < 0.15:
        backend.enable_padding(length=9, pad_token="<|pad|>", pad_id=ids["<|pad|>"])
    return backend


def _merges(words: list[str], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Merges that build each word from its characters, left to right."""
    merges: list[tuple[str, str]] = []
    for word in words:
        left = word[0]
        for char in word[1:]:
            if (left, char) not in merges:
                merges.append((left, char))
                vocab.setdefault(left + char, len(vocab))
            left += char
    return merges


def _byte_level(rng: random.Random) -> tokenizers.Tokenizer:
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = rng.sample(WORDS, 8)
    merges = _merges(words + ["Ġ" + word for word in words[:4]], vocab)
    if rng.random() < 0.3:
        vocab["<|endoftext|>"] = len(vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    to_bytes = pre_tokenizers.ByteLevel(
        add_prefix_space=rng.random() < 0.2, use_regex=rng.random() < 0.5
    )
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "isolated")
    digits = pre_tokenizers.Digits(individual_digits=True)
    steps = rng.choice([[to_bytes], [digits, to_bytes], [split, to_bytes]])
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if rng.random() < 0.3:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(rng: random.Random) -> tokenizers.Tokenizer:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for char in "▁abcdefghijklmnopqrstuvwxyz0123456789":
        vocab[char] = len(vocab)
    words = rng.sample(WORDS, 7)
    merges = _merges(words + ["▁" + word for word in words[:3]], vocab)
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    backend = tokenizers.Tokenizer(model)
    if rng.random() < 0.5:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(steps)
    else:
        scheme = rng.choice(["always", "first", "never"])
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return backend


def _words(rng: random.Random) -> tokenizers.Tokenizer:
    vocab = {word: i for i, word in enumerate(["<unk>", *WORDS, ":", ".", "|", "<", ">"])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


def _unigram(rng: random.Random) -> tokenizers.Tokenizer:
    pieces = [("<unk>", 0.0), ("▁", -3.0), *((w, -rng.uniform(2, 9)) for w in WORDS)]
    pieces += [(char, -10.0) for char in "abcdefghijklmnopqrstuvwxyz0123456789"]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme=rng.choice(["always", "first", "never"])
    )
    backend.decoder = decoders.Metaspace()
    return backend


def _config(rng: random.Random, backend: tokenizers.Tokenizer) -> dict[str, Any]:
    byte_fallback = isinstance(backend.model, models.BPE) and backend.token_to_id("<s>") == 1
    own = "LlamaTokenizer" if byte_fallback else rng.choice(["Qwen2Tokenizer", "GPT2Tokenizer"])
    classes = ["PreTrainedTokenizerFast", "TokenizersBackend", "MyTokenizer", None, own]
    classes += [f"{own}Fast", "LlamaTokenizerFast"]
    if not isinstance(backend.model, models.BPE) and rng.random() < 0.9:
        classes = ["PreTrainedTokenizerFast", "MyTokenizer", None]
    config: dict[str, Any] = {}
    name = rng.choice(classes)
    if name is not None:
        config["tokenizer_class"] = name
    for flag in ("add_bos_token", "add_eos_token", "legacy", "add_prefix_space"):
        value = rng.choice([True, False, None, "absent"])
        if value != "absent" and rng.random() < 0.6:
            config[flag] = value
    if rng.random() < 0.1:
        config["split_special_tokens"] = True
    if rng.random() < 0.3:
        config["clean_up_tokenization_spaces"] = False
    config["model_max_length"] = rng.choice([2048, 1000000000000000019884624838656])
    return config


def _token(rng: random.Random, text: str) -> Any:
    flags = {"lstrip": False, "normalized": False, "rstrip": rng.random() < 0.3}
    full = {"__type": "AddedToken", "content": text, **flags, "single_word": False}
    return full if rng.random() < 0.4 else text


def _declare(
    rng: random.Random, backend: tokenizers.Tokenizer, config: dict[str, Any], folder: Path
) -> None:
    roles = {"eos_token": "<|eos|>", "bos_token": "<|bos|>", "pad_token": "<|pad|>"}
    roles |= {"unk_token": rng.choice(["<unk>", "<|im_end|>"]), "eos_token": "<|im_end|>"}
    roles |= {"sep_token": "<|new_sep|>", "image_token": "<|image|>"}
    kept = {k: v for k, v in roles.items() if rng.random() < (0.3 if k > "q" else 0.8)}
    where = rng.choice(["config", "map", "both"])
    if where in ("config", "both"):
        config |= {key: _token(rng, text) for key, text in kept.items()}
        if rng.random() < 0.2:
            config["bos_token"] = None
    if where in ("map", "both"):
        mapped = {key: _token(rng, text) for key, text in kept.items()}
        for value in mapped.values():
            if isinstance(value, dict):
                del value["__type"]
        _write(folder / "special_tokens_map.json", mapped)
    key = rng.choice(["extra_special_tokens", "additional_special_tokens"])
    if rng.random() < 0.3:
        config[key] = ["<|tool|>", "<|more|>"]
    elif rng.random() < 0.1:
        config["extra_special_tokens"] = {"video_token": "<|video|>"}
    if rng.random() < 0.5:
        config["added_tokens_decoder"] = _decoder(rng, backend)
    elif rng.random() < 0.2:
        size = backend.get_vocab_size()
        misplaced = {"<|im_end|>": size + 1} if rng.random() < 0.1 else {}
        _write(folder / "added_tokens.json", {"<|old|>": size, **misplaced})


def _decoder(rng: random.Random, backend: tokenizers.Tokenizer) -> dict[str, Any]:
    found = {}
    for index, token in backend.get_added_tokens_decoder().items():
        entry: dict[str, Any] = {"content": token.content, "special": token.special}
        if rng.random() < 0.8:
            flags = ("lstrip", "rstrip", "single_word", "normalized")
            entry |= {flag: getattr(token, flag) for flag in flags}
        found[str(index)] = entry
    if rng.random() < 0.4:
        size = backend.get_vocab_size()
        found[str(size)] = {"content": "<|late|>"}
        found[str(size + 1)] = {"content": "<|later|>", "special": True}
    if rng.random() < 0.2:
        found.pop(next(iter(found)))
    return found


def _templates(rng: random.Random, config: dict[str, Any], folder: Path) -> None:
    plain, tools = TEMPLATE, WITH_TOOLS + TEMPLATE
    if rng.random() < 0.4:
        plain = OTHERS + plain
    style = rng.choice(["string", "list", "object", "file", "files", "only files", "json", "none"])
    named = {"default": plain, "tool_use": tools, "rag": "x"}
    if style in ("string", "file", "files"):
        config["chat_template"] = plain if style == "string" else "never"
    elif style == "list":
        config["chat_template"] = [{"name": n, "template": t} for n, t in named.items()]
    elif style == "object":
        config["chat_template"] = named
    if style in ("file", "files"):
        (folder / "chat_template.jinja").write_text(tools.replace("\\n", "\r\n"), "utf-8")
    if style in ("files", "only files"):
        (folder / "additional_chat_templates").mkdir(exist_ok=True)
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(tools + "\n", "utf-8")
    if style == "json":
        # What processors write; tokenizers do not read it.
        _write(folder / "chat_template.json", {"chat_template": plain})


def _model(rng: random.Random, folder: Path, backend: tokenizers.Tokenizer) -> None:
    size = backend.get_vocab_size()
    ends = rng.choice([None, 3, [3, 5], [size - 1]])
    types = ["llama", "mistral", "qwen3", "qwen2", "olmo2", "smollm3"]
    # transformers makes a BPE of every qwen2 folder, whatever its files hold.
    plain = not isinstance(backend.model, models.BPE) and rng.random() < 0.9
    model_type = rng.choice(types[:2] if plain else types)
    config = {"model_type": model_type, "eos_token_id": rng.choice([None, 2, [2, 4]])}
    if rng.random() < 0.2 and not plain:
        config["tokenizer_class"] = "GPT2Tokenizer"
    if rng.random() < 0.1:
        del config["model_type"]
    if rng.random() < 0.95:
        _write(folder / "config.json", config)
    if rng.random() < 0.6:
        _write(folder / "generation_config.json", {"eos_token_id": ends})
