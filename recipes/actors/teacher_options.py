"""From whom a student learns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """The teacher of an on-policy distillation, with --algorithm opd."""

    teacher: str | None = None
    """Model that says how likely each sampled token would have been to it: a Hugging Face folder or
    GGUF file with the tokens of --model."""
    teacher_kv_memory_gb: float = 1.0
    """Memory of the teacher's KV cache, GiB, beside --kv-memory-gb."""
