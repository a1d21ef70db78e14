"""The tokenizer of a Hugging Face folder, made with the tokenizers library alone.

Ids and chat text are those of `transformers.AutoTokenizer` (5.x), or the folder is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from engine.errors import ModelNotFound
from rollout.text.folder.json_files import (
    broken,
    optional_flag,
    read_object,
    read_text,
    token_ids,
)
from rollout.text.folder.pipeline import read_pipeline
from rollout.text.folder.templates import read_templates
from rollout.text.folder.tokens import ROLES, DeclaredTokens, add_tokens, content, read_tokens
from rollout.text.special_tokens import SpecialTokens

_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True, kw_only=True)
class FolderTokenizer:
    """What the folder holds: the tokenizer, its role tokens and its chat templates by name."""

    backend: Tokenizer
    special: SpecialTokens
    templates: Mapping[str, str]


def read_hf_folder(folder: Path) -> FolderTokenizer:
    """Read the tokenizer of `folder` from its tokenizer.json and the files beside it.

    `add_bos_token` and `add_eos_token` change nothing, as in transformers: the post-processor of
    tokenizer.json says what is added. Raises ModelNotFound without a tokenizer.json,
    CheckpointError naming file and key if a file is broken or asks for what is not served.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ModelNotFound(
            f"{folder} has no tokenizer.json, which text needs: save a fast tokenizer there"
            if (folder / "config.json").exists()
            else f"{folder} holds no model: it has neither a config.json nor a tokenizer.json",
            field="model",
        )
    config, model = read_object(folder / _CONFIG), read_object(folder / "config.json")
    _refuse_unserved(folder / _CONFIG, config)
    pipeline = read_pipeline(folder, config, model, read_text(path))
    tokens = read_tokens(folder, config, pipeline.source, pipeline.defaults)
    backend = pipeline.backend
    backend.encode_special_tokens = bool(
        optional_flag(folder / _CONFIG, config, "split_special_tokens")
    )
    add_tokens(backend, tokens)
    if pipeline.finally_special:
        texts = dict.fromkeys(content(t) for t in [*tokens.roles.values(), *tokens.extra])
        backend.add_tokens([AddedToken(text, special=True) for text in texts if text])
    return FolderTokenizer(
        backend=backend,
        special=_special_tokens(folder, backend, tokens, model),
        templates=read_templates(folder, config),
    )


def _refuse_unserved(path: Path, config: dict[str, Any]) -> None:
    """Keys with which transformers makes another tokenizer than the one made here."""
    for key, what in {
        "init_inputs": "passes arguments by position",
        "fix_mistral_regex": "replaces the pre-tokenizer of tokenizer.json",
    }.items():
        if config.get(key):
            raise broken(path, key, f"{what}, which is not served; remove it")
    if config.get("fast_tokenizer_files", ["tokenizer.json"]) != ["tokenizer.json"]:
        raise broken(path, "fast_tokenizer_files", "names other files; only tokenizer.json is read")


def _special_tokens(
    folder: Path, backend: Tokenizer, tokens: DeclaredTokens, model: dict[str, Any]
) -> SpecialTokens:
    texts = {role: content(token) for role, token in tokens.roles.items()}
    eos = texts.get("eos_token")
    ends = [] if eos is None else [backend.token_to_id(eos)]
    path = folder / "generation_config.json"
    listed = token_ids(path, read_object(path), "eos_token_id")
    if listed is None:
        listed = token_ids(folder / "config.json", model, "eos_token_id")
    ends += listed or []
    return SpecialTokens(
        bos=texts.get("bos_token"),
        eos=eos,
        unk=texts.get("unk_token"),
        pad=texts.get("pad_token"),
        others={k: v for k, v in texts.items() if k not in _NAMED},
        eos_ids=[i for i in dict.fromkeys(ends) if i is not None],
    )


_NAMED = tuple(role for role in ROLES if role[:3] in ("bos", "eos", "unk", "pad"))
