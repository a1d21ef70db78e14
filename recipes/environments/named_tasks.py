"""Tasks by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from engine.errors import InvalidRequest
from recipes.data.data_options import ONLY_OF_FILES, DataOptions
from recipes.data.source import FORMATS, suffix_of
from recipes.environments import procedural
from recipes.environments.base import Environment, GradedByCode
from recipes.environments.expression import Expression
from recipes.environments.file_task import load_task
from recipes.environments.gym import load_gym

BUILT_IN: Mapping[str, Callable[[], Environment]] = MappingProxyType(
    {
        "largest": procedural.largest,
        "sorting": procedural.sorting,
        "addition": procedural.addition,
        "letter_count": procedural.letter_count,
        "expression": Expression,
    }
)


def select_environment(
    task: str, data: DataOptions | None = None, *, needs_answer: bool = True
) -> Environment:
    """A built-in task, a file or folder of problems, or `gym:<reasoning-gym task>`.

    data: columns and splits of a file. needs_answer: whether its rows must have an answer. Raises
    InvalidRequest naming `task` and listing what there is, or an option that only a file has.
    """
    if is_file_task(task):
        return load_task(Path(task), data, needs_answer=needs_answer)
    check_columns(task, data or DataOptions())
    if task in BUILT_IN:
        return BUILT_IN[task]()
    if task.startswith("gym:"):
        return load_gym(task.removeprefix("gym:"))
    raise InvalidRequest(
        f"task: no task {task!r}; there are {', '.join(BUILT_IN)}, a path to prompts and answers "
        f"({FORMATS}), and gym:<name> for reasoning-gym",
        field="task",
    )


def runs_code(task: str) -> bool:
    """Whether the replies to a task are programs, which its own reward runs."""
    return task in BUILT_IN and isinstance(BUILT_IN[task](), GradedByCode)


def check_columns(task: str, data: DataOptions) -> None:
    """Raises InvalidRequest for an option that only a file has; the task is none."""
    for name in ONLY_OF_FILES:
        if getattr(data, name) is not None:
            raise InvalidRequest(
                f"{name}: --{name.replace('_', '-')} speaks of a file or folder, which the task "
                f"{task} is not; leave it out",
                field=name,
            )


def is_file_task(task: str) -> bool:
    """Whether a task is a file or folder rather than a name."""
    if task in BUILT_IN or task.startswith("gym:"):
        return False
    return bool(suffix_of(Path(task))) or Path(task).exists()
