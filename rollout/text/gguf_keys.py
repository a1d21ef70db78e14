"""Keys of a GGUF file that describe its tokenizer, and what becomes of each.

`READ` is used by `gguf_tokenizer.py`; `HARMLESS` changes no id and no text; `NEUTRAL` is refused
unless its value changes nothing, and so is an unknown key that is not zero, false or empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from engine.errors import CheckpointError, ModelError

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"

READ = frozenset(
    {
        "model",
        "pre",
        "tokens",
        "token_type",
        "scores",
        "merges",
        "add_bos_token",
        "add_eos_token",
        "add_space_prefix",
        "bos_token_id",
        "eos_token_id",
        "eot_token_id",
        "eom_token_id",
        "unknown_token_id",
        "padding_token_id",
    }
)
HARMLESS = frozenset(
    {
        # Tokens with a role that no request here asks for; their ids change nothing.
        "seperator_token_id",
        "separator_token_id",
        "mask_token_id",
        "cls_token_id",
        "prefix_token_id",
        "suffix_token_id",
        "middle_token_id",
        "fim_pre_token_id",
        "fim_suf_token_id",
        "fim_mid_token_id",
        "fim_pad_token_id",
        "fim_rep_token_id",
        "fim_sep_token_id",
        # Segments, which no decoder has.
        "token_type_count",
    }
)
NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "add_sep_token": (False,),
        "escape_whitespaces": (True,),
        "precompiled_charsmap": ([],),
        "remove_extra_whitespaces": (False,),
    }
)
_NO_TOKEN = 2**32 - 1


def check_tokenizer_keys(metadata: Mapping[str, Any]) -> None:
    """Refuse a file with a tokenizer key that is not followed. Raises ModelError naming it."""
    for name, value in metadata.items():
        key = name.removeprefix(PREFIX)
        if key == name or key in READ or key in HARMLESS:
            continue
        if key in NEUTRAL:
            neutral = value in NEUTRAL[key]
        else:
            neutral = not (any(value) if isinstance(value, list) else value)
        if not neutral:
            raise ModelError(
                f"the GGUF file has {name} {value!r:.80}, which is not served; use the model's "
                "Hugging Face folder instead",
                field=name,
            )


def listed(metadata: Mapping[str, Any], name: str, kind: type, count: int | None) -> list[Any]:
    """An array of a file: `count` values of one type.

    Raises CheckpointError naming the key for one that is missing, of another type or length.
    """
    key = f"{PREFIX}{name}"
    value = metadata.get(key)
    if value is None:
        raise CheckpointError(f"the GGUF file has no {key}", field=key)
    if not isinstance(value, list) or any(type(item) is not kind for item in value):
        raise CheckpointError(f"{key} is not an array of {kind.__name__}", field=key)
    if count is not None and len(value) != count:
        raise CheckpointError(f"{key} has {len(value)} values for {count} tokens", field=key)
    return value


def switch(metadata: Mapping[str, Any], name: str) -> bool | None:
    """true, false, or None where the key is absent. Raises CheckpointError naming it."""
    key = f"{PREFIX}{name}"
    value = metadata.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{key} is {value!r:.80}, not true or false", field=key)
    return value


def token_id(metadata: Mapping[str, Any], role: str, num_tokens: int) -> int | None:
    """Id of the token with a role; None where there is none. Raises CheckpointError naming the
    key for an id that no token has."""
    key = f"{PREFIX}{role}_token_id"
    value = metadata.get(key)
    if value is None or value in (-1, _NO_TOKEN):
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < num_tokens:
        raise CheckpointError(f"{key} is {value!r:.80}, no id of {num_tokens} tokens", field=key)
    return value


def chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a file by name, "default" being the one without a name.

    Raises CheckpointError naming the key for one that is no text.
    """
    found = {}
    for key, value in metadata.items():
        if key == TEMPLATE or key.startswith(f"{TEMPLATE}."):
            if not isinstance(value, str):
                raise CheckpointError(f"{key} is {value!r:.80}, not a template", field=key)
            name = key.removeprefix(TEMPLATE).removeprefix(".") or "default"
            if "/" in name:
                raise CheckpointError(f"{key} has a name that cannot be a file's", field=key)
            found[name] = value
    return found
