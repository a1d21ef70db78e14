"""The teacher of an on-policy distillation: an engine that scores what the student sampled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.errors import ContextTooLong, InvalidRequest, ModelNotFound, SlipstreamError
from engine.protocol import ReplicaState


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """From whom the student learns, with --algorithm opd."""

    teacher: str | None = None
    """Model whose judgement of each token is learned from: a Hugging Face folder or GGUF file with
    the tokens of --model."""
    teacher_kv_memory_gb: float = 1.0
    """Memory of the teacher's KV cache, GiB, beside --kv-memory-gb."""
