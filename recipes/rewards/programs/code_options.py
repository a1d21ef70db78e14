"""Options of rewards that run what a model wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recipes.sandbox.program import SandboxPolicy

CodeScore = Literal["all", "share"]


@dataclass(frozen=True, kw_only=True)
class CodeOptions:
    """How programs are run, and what they earn."""

    sandbox: SandboxPolicy = "require"
    """'require' refuses a machine whose kernel cannot confine a program (Landlock and seccomp);
    'best-effort' runs programs there with what there is."""
    code_reward: CodeScore = "all"
    """What a program earns: 1 if it passes all its tests, or the share that it passes."""
    code_seconds: int = 5
    """Processor time of a program, whole seconds; it has six times as long by the clock."""
    code_memory_gb: float = 1.0
    """Memory of a program, GiB."""
