"""What a run's folder says of itself: its options, its result, and whether it goes on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import InvalidRequest
from rollout.dashboard.runs.lenient_json import read_object, whole_text
from rollout.dashboard.runs.line_tail import open_regular

CONFIG = "config.json"
_SUMMARY = "summary.json"
_LOCK = ".lock"
_METRICS = "metrics.jsonl"
_LOCKS = Path("/proc/locks")
_MOST_BYTES = 16 << 20
"""Of the options: a file of more is none."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options that the page shows. steps: how many there are to be, 0 where nobody knows.
    samples_replies: whether a step samples any; a supervised run does not."""

    name: str
    model: str = ""
    steps: int = 0
    samples_replies: bool = True


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run: one that has begun has its options there."""
    return (folder / CONFIG).is_file() or (folder / _METRICS).is_file()


def require_run(folder: Path) -> None:
    """Raises InvalidRequest (`run`) for what is no run's folder."""
    if not folder.is_dir():
        told = "is no folder" if folder.exists() else "is not there"
        raise InvalidRequest(f"run: {folder} {told}; give the folder of a run", field="run")
    if not is_run(folder):
        raise InvalidRequest(
            f"run: {folder} has neither {CONFIG} nor {_METRICS}: it is no folder of a run, and "
            "holds none; give one that recipes/grpo.py, ppo.py or sft.py wrote",
            field="run",
        )


def config_stamp(folder: Path) -> tuple[int, int]:
    """Another one when the options of a run were written anew."""
    try:
        found = os.stat(folder / CONFIG)
    except OSError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_size)


def read_config(folder: Path) -> RunConfig:
    """The options of a run; of a folder without them, or half of them, its name alone."""
    values = _read(folder / CONFIG)
    steps, model = values.get("steps"), values.get("model")
    return RunConfig(
        name=whole_text(folder.resolve().name),
        model=Path(model).name if isinstance(model, str) else "",
        steps=steps if isinstance(steps, int) and not isinstance(steps, bool) else 0,
        # Only supervised runs have it.
        samples_replies="train_on" not in values,
    )


def is_running(folder: Path) -> bool:
    """Whether a run of this machine holds the folder (`recipes.run.run_folder.RunFolder.claim`).

    The lock is looked up and not tried: whoever holds it, for however short a time, keeps a run
    that begins from having it. False where the system has no list of locks.
    """
    try:
        inode = os.stat(folder / _LOCK).st_ino
        lines = _LOCKS.read_text().splitlines()
    except OSError:
        return False
    # "1: FLOCK  ADVISORY  WRITE 4711 fe:00:1234 0 EOF", proc_locks(5).
    held = (line.split() for line in lines if " FLOCK " in line)
    return any(words[5].rpartition(":")[2] == str(inode) for words in held if len(words) > 5)


def is_over(folder: Path) -> bool:
    """Whether the run came to its end."""
    return (folder / _SUMMARY).is_file()


def _read(path: Path) -> dict[str, Any]:
    try:
        with open(open_regular(path), "rb") as file:
            return read_object(file.read(_MOST_BYTES)) or {}
    except (OSError, InvalidRequest):
        return {}
