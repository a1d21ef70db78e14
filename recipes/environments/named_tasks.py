"""Tasks by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from engine.errors import InvalidRequest
from recipes.environments import procedural
from recipes.environments.base import Environment
from recipes.environments.gym import load_gym
from recipes.environments.jsonl import load_jsonl

BUILT_IN: Mapping[str, Callable[[], Environment]] = MappingProxyType(
    {
        "largest": procedural.largest,
        "sorting": procedural.sorting,
        "addition": procedural.addition,
        "letter_count": procedural.letter_count,
    }
)


def select_environment(task: str) -> Environment:
    """A built-in task, a `.jsonl` file, or `gym:<reasoning-gym task>`.

    Raises InvalidRequest naming `task` and listing what there is.
    """
    if task in BUILT_IN:
        return BUILT_IN[task]()
    if task.startswith("gym:"):
        return load_gym(task.removeprefix("gym:"))
    if task.endswith((".jsonl", ".jsonl.gz")):
        return load_jsonl(Path(task))
    raise InvalidRequest(
        f"task: no task {task!r}; there are {', '.join(BUILT_IN)}, a path to a .jsonl file of "
        "prompts and answers, and gym:<name> for reasoning-gym",
        field="task",
    )
