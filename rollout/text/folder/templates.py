"""The chat templates of a model folder, by name.

As transformers chooses: `chat_template.jinja` and the files of `additional_chat_templates/` come
before `chat_template` of tokenizer_config.json, which is a template, a list of named ones or an
object of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rollout.text.folder.json_files import as_text, broken, read_text

_FILE = "chat_template.jinja"
_MORE = "additional_chat_templates"
_KEY = "chat_template"


def read_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The templates of `folder`, whose tokenizer_config.json is `config`; "default" is the one
    for conversations without tools. Raises CheckpointError naming file and key."""
    found = {}
    if (folder / _FILE).exists():
        found["default"] = read_text(folder / _FILE)
    for path in sorted((folder / _MORE).glob("*.jinja")):
        found[path.name.removesuffix(".jinja")] = read_text(path)
    return found or _configured(folder / "tokenizer_config.json", config.get(_KEY))


def _configured(path: Path, value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, list):
        return dict(_named(path, entry) for entry in value)
    if isinstance(value, dict):
        return dict(_named(path, {"name": name, "template": text}) for name, text in value.items())
    return {"default": as_text(path, _KEY, value)}


def _named(path: Path, entry: Any) -> tuple[str, str]:
    if not isinstance(entry, dict) or not {"name", "template"} <= entry.keys():
        raise broken(path, _KEY, "lists something other than objects of a name and a template")
    name = as_text(path, f"{_KEY}.name", entry["name"])
    if name != Path(name).name:
        raise broken(path, _KEY, f"has the name {name!r}, which cannot be a file's")
    return name, as_text(path, f"{_KEY}.{name}", entry["template"])
