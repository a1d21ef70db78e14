"""Added tokens and tokens with a role: what the files of a folder declare.

As transformers merges them: `added_tokens_decoder` of tokenizer_config.json is all there is where
it exists. Otherwise special_tokens_map.json, then added_tokens.json, then the added tokens of
tokenizer.json apply in this order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from rollout.text.folder.json_files import as_text, broken, read_object

ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_EXTRA, _EXTRA_BEFORE = "extra_special_tokens", "additional_special_tokens"
_DECODER = "added_tokens_decoder"

Token = str | AddedToken


@dataclass(frozen=True, kw_only=True)
class DeclaredTokens:
    """What the files say of tokens, before a tokenizer has them.

    file: which declares `by_id`. by_id: added tokens by their ids. roles: token of each role by
    the role's name ("eos_token"), those of this model alone ("image_token") last. extra: further
    special tokens.
    """

    file: Path
    by_id: dict[int, AddedToken]
    roles: dict[str, Token]
    extra: list[Token]


def read_tokens(
    folder: Path, config: dict[str, Any], source: dict[str, Any], defaults: Mapping[str, str | None]
) -> DeclaredTokens:
    """The tokens that a folder declares.

    config, source: contents of tokenizer_config.json and tokenizer.json. defaults: roles that the
    folder's tokenizer class has where no file speaks of them; null in a file is no token.
    Raises CheckpointError naming file and key.
    """
    path = folder / "tokenizer_config.json"
    values = {**config}
    if _EXTRA_BEFORE in values and not values.get(_EXTRA):
        values[_EXTRA] = values[_EXTRA_BEFORE]
    if _DECODER in config:
        file, by_id = path, _decoder(path, config[_DECODER])
    else:
        _merge_map(folder / "special_tokens_map.json", values)
        file = folder / "tokenizer.json"
        by_id = _added_before(folder / "added_tokens.json", _special_texts(path, values))
        by_id |= _serialised(file, source.get("added_tokens"))
    if isinstance(source.get("padding"), dict) and "pad_token" not in defaults:
        values.setdefault("pad_token", source["padding"].get("pad_token"))
    roles = _roles(path, values, defaults)
    named = {token.content: token for token in by_id.values()}
    return DeclaredTokens(
        file=file,
        by_id=by_id,
        roles={role: named.get(content(token), token) for role, token in roles.items()},
        extra=_extra(path, _EXTRA, values.get(_EXTRA)),
    )


def add_tokens(backend: Tokenizer, tokens: DeclaredTokens) -> None:
    """Give `backend` the declared tokens that it lacks, in place.

    Raises CheckpointError for a token that would get another id than its file gives it.
    """
    present = backend.get_added_tokens_decoder().values()
    signatures = {repr(token) for token in present}
    new: list[Token] = [
        token for _, token in sorted(tokens.by_id.items()) if repr(token) not in signatures
    ]
    known = {token.content for token in present} | {content(token) for token in new}
    for token in [*tokens.roles.values(), *tokens.extra]:
        if content(token) not in known:
            known.add(content(token))
            new.append(token)
    named = {content(token) for token in tokens.roles.values()}
    backend.add_tokens([_as_added(token, named) for token in new if content(token)])
    for index, token in tokens.by_id.items():
        given = backend.token_to_id(token.content)
        if given != index:
            what = f"gives {token.content!r} id {index}, where the vocabulary has {given}"
            raise broken(tokens.file, _DECODER, what)


def content(token: Token) -> str:
    """The text of a token."""
    return token if isinstance(token, str) else token.content


def _as_added(token: Token, named: set[str]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    if not token.special and token.content in named:
        token.special = True
    return token


def _decoder(path: Path, value: Any) -> dict[int, AddedToken]:
    if not isinstance(value, dict):
        raise broken(path, _DECODER, "is not an object of tokens by their ids")
    found = {}
    for index, token in value.items():
        if not index.isdecimal() or len(index) > 10:
            raise broken(path, _DECODER, f"has {index!r} where a token's id belongs")
        found[int(index)] = _added(path, f"{_DECODER}.{index}", token)
    return found


def _serialised(path: Path, value: Any) -> dict[int, AddedToken]:
    """The added tokens of tokenizer.json; the tokenizers library has already read them once."""
    if value is None:
        return {}
    if not isinstance(value, list):
        raise broken(path, "added_tokens", "is not a list")
    found = {}
    for position, entry in enumerate(value):
        key = f"added_tokens[{position}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), int):
            raise broken(path, key, "is not a token with an id")
        found[entry["id"]] = _added(path, key, entry)
    return found


def _added_before(path: Path, special: set[str]) -> dict[int, AddedToken]:
    """added_tokens.json, which older versions of transformers wrote: ids by text."""
    found = {}
    for text, index in read_object(path).items():
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise broken(path, text, f"has id {index!r}, not a token id")
        is_special = as_text(path, text, text) in special
        found[index] = AddedToken(text, normalized=not is_special, special=is_special)
    return found


def _merge_map(path: Path, values: dict[str, Any]) -> None:
    """Let special_tokens_map.json override `values`, in place."""
    for key, value in read_object(path).items():
        if key in (_EXTRA, _EXTRA_BEFORE):
            _merge_extra(path, key, value, values)
        elif value is None or not (key in ROLES or _names_token(value)):
            values[key] = value
        elif isinstance(value, dict):
            values[key] = _added(path, key, {**value, "special": True})
        else:
            values[key] = as_text(path, key, value)


def _merge_extra(path: Path, key: str, value: Any, values: dict[str, Any]) -> None:
    if key == _EXTRA_BEFORE:
        values.setdefault(_EXTRA, _extra(path, key, value))
    elif isinstance(value, dict):
        values[_EXTRA] = _named_extra(path, key, value)
    else:
        before = values.get(_EXTRA)
        listed = before if isinstance(before, list) else []
        values[_EXTRA] = [*listed, *_extra(path, key, value)]


def _roles(
    path: Path, values: dict[str, Any], defaults: Mapping[str, str | None]
) -> dict[str, Token]:
    extra = values.get(_EXTRA)
    own = {
        key: value
        for key, value in values.items()
        if key.endswith("_token") and key not in ROLES and _names_token(value)
    }
    own |= _named_extra(path, _EXTRA, extra) if isinstance(extra, dict) else {}
    standard = {role: values.get(role, defaults.get(role)) for role in ROLES}
    return {
        key: _token(path, key, value)
        for key, value in {**standard, **own}.items()
        if value is not None
    }


def _names_token(value: Any) -> bool:
    return isinstance(value, str | AddedToken) or (isinstance(value, dict) and "content" in value)


def _named_extra(path: Path, key: str, value: dict[str, Any]) -> dict[str, Token]:
    return {name: _token(path, f"{key}.{name}", token) for name, token in value.items()}


def _extra(path: Path, key: str, value: Any) -> list[Token]:
    if value is None or isinstance(value, dict):
        return []
    if not isinstance(value, list):
        raise broken(path, key, "is not a list of tokens")
    return [_token(path, f"{key}[{i}]", token) for i, token in enumerate(value)]


def _special_texts(path: Path, values: dict[str, Any]) -> set[str]:
    roles = _roles(path, values, {}).items()
    standard: Iterable[Token] = [token for role, token in roles if role in ROLES]
    return {content(token) for token in [*standard, *_extra(path, _EXTRA, values.get(_EXTRA))]}


def _token(path: Path, key: str, value: Any) -> Token:
    """A token in a configuration is its text, or an object with `content` and flags."""
    if isinstance(value, AddedToken):
        return value
    if isinstance(value, dict):
        return _added(path, key, value)
    return as_text(path, key, value)


def _added(path: Path, key: str, value: Any) -> AddedToken:
    if not isinstance(value, dict) or "content" not in value:
        raise broken(path, key, "is not a token: an object with its 'content'")
    flags = {}
    for name, flag in value.items():
        if name in _FLAGS:
            if not isinstance(flag, bool):
                raise broken(path, f"{key}.{name}", f"is {flag!r}, not true or false")
            flags[name] = flag
        elif name not in ("content", "id", "__type"):
            raise broken(path, f"{key}.{name}", "is not a flag of a token")
    return AddedToken(as_text(path, f"{key}.content", value["content"]), **flags)
