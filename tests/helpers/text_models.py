"""Folders of models that have the byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.tiny_tokenizer import tiny_tokenizer


def fake_text_model(folder: Path) -> str:
    """A folder that `fake_config` takes for its model, with a tokenizer and nothing else."""
    tiny_tokenizer().write_hf(folder)
    return str(folder)
