"""Read the tokenizer of a Hugging Face folder with the tokenizers library alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from engine.errors import CheckpointError, ModelNotFound
from rollout.text.special_tokens import SpecialTokens, wrap_with_special


@dataclass(frozen=True, kw_only=True)
class FolderTokenizer:
    """What the folder holds: the tokenizer, its role tokens and its chat template."""

    backend: Tokenizer
    special: SpecialTokens
    chat_template: str | None


def read_hf_folder(folder: Path) -> FolderTokenizer:
    """Read `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`.

    Raises ModelNotFound without a `tokenizer.json`, CheckpointError if one is broken.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelNotFound(
            f"{folder} has no tokenizer.json; save a fast tokenizer there, or send input_ids",
            field="model",
        )
    backend = _read_backend(path)
    config = _read_json(folder / "tokenizer_config.json")
    _add_missing(backend, config)
    special = _special_tokens(backend, config, folder)
    if "add_bos_token" in config or "add_eos_token" in config:
        bos, eos = bool(config.get("add_bos_token")), bool(config.get("add_eos_token"))
        wrap_with_special(backend, special, bos=bos, eos=eos)
    return FolderTokenizer(
        backend=backend, special=special, chat_template=_chat_template(folder, config)
    )


def _read_backend(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(path.read_text("utf-8"))
    except Exception as error:  # the tokenizers library raises bare Exception on bad JSON
        raise CheckpointError(f"{path} is not a tokenizer: {error}", field="model") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}", field="model") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object", field="model")
    return value


def _content(token: Any) -> str | None:
    """A token in the configuration is a string, or an object with its `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _add_missing(backend: Tokenizer, config: dict[str, Any]) -> None:
    """Tokens that only `tokenizer_config.json` knows, at the ids it gives them."""
    known = backend.get_added_tokens_decoder()
    decoder = config.get("added_tokens_decoder", {})
    for index, token in sorted(decoder.items(), key=lambda item: int(item[0])):
        text = _content(token)
        if text is None or int(index) in known:
            continue
        flags = {k: token[k] for k in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        added = AddedToken(text, **flags)
        (backend.add_special_tokens if added.special else backend.add_tokens)([added])
        if backend.token_to_id(text) != int(index):
            raise CheckpointError(
                f"added token {text!r} should have id {index}, the vocabulary gives it "
                f"{backend.token_to_id(text)}",
                field="added_tokens_decoder",
            )


def _special_tokens(backend: Tokenizer, config: dict[str, Any], folder: Path) -> SpecialTokens:
    eos = _content(config.get("eos_token"))
    ends = [] if eos is None else [backend.token_to_id(eos)]
    for name in ("generation_config.json", "config.json"):
        listed = _read_json(folder / name).get("eos_token_id")
        if listed is not None:
            ends += listed if isinstance(listed, list) else [listed]
            break
    return SpecialTokens(
        bos=_content(config.get("bos_token")),
        eos=eos,
        unk=_content(config.get("unk_token")),
        pad=_content(config.get("pad_token")),
        eos_ids=[i for i in dict.fromkeys(ends) if i is not None],
    )


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None
