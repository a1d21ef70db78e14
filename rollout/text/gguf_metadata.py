"""The metadata of a GGUF file, with the strings that a tokenizer is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, ModelNotFound
from engine.protocol.gguf_header import BrokenHeader, read_gguf_header


def read_gguf_metadata(path: str | Path) -> dict[str, Any]:
    """Every key of the file's metadata: str, bool, int, float, or a list of one of them.

    Raises ModelNotFound if there is no such file, CheckpointError if it is not GGUF.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelNotFound(f"no GGUF file at {path}", field="model")
    try:
        return read_gguf_header(path, strings=True).metadata
    except BrokenHeader as error:
        raise CheckpointError(f"{path} {error}", field="model") from error
