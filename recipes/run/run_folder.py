"""The folder a run leaves behind.

::

    config.json       every option
    metrics.jsonl     one object a step
    samples.jsonl     a few rollouts of each step, as text
    rollouts.jsonl    a few groups of each step, token by token
    evaluations.jsonl one object an evaluation, those before and after training included
    summary.json      the result
    plots.png         curves over steps: reward, accuracy, entropy, mismatch, length, time
    checkpoints/      the last complete checkpoint
    model/            the final model, Hugging Face format
    .lock             held by the run that writes here, empty
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from recipes.run.plots import draw_page
from recipes.types import Group
from rollout.offline import append_bytes, parse_line, read_lines, replace_file

logger = logging.getLogger(__name__)

SAMPLES_A_STEP = 2


class RunFolder:
    """Writes a run's files. Lines of metrics and samples carry their step. A full disk is DiskFull,
    and what was there before is whole.

    active: false in the processes of a run that leave the writing to the first.
    """

    def __init__(self, path: Path, *, active: bool = True) -> None:
        self.path = path
        self._active = active
        self.metrics_path = path / "metrics.jsonl"
        self.samples_path = path / "samples.jsonl"
        self.rollouts_path = path / "rollouts.jsonl"
        self.evaluations_path = path / "evaluations.jsonl"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self._claim: int | None = None
        if active:
            path.mkdir(parents=True, exist_ok=True)

    def claim(self) -> bool:
        """Keep other runs out of the folder until `close`, or the end of the process however it
        ends. False if another run has it; true where the file system knows no locks."""
        if not self._active or self._claim is not None:
            return True
        lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        except OSError as error:
            logger.warning("%s cannot be locked (%s): start no other run there", self.path, error)
        self._claim = lock
        return True

    def close(self) -> None:
        """Let other runs in. Idempotent."""
        claim, self._claim = self._claim, None
        if claim is not None:
            os.close(claim)

    def write_config(self, config: dict[str, Any]) -> None:
        """Write config.json."""
        self._write_json("config.json", config)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json."""
        self._write_json("summary.json", summary)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add the row of a step."""
        if self._active:
            append_bytes(self.metrics_path, _lines([row]))

    def append_evaluation(self, row: dict[str, Any]) -> None:
        """Add the figures of an evaluation after some step."""
        if self._active:
            append_bytes(self.evaluations_path, _lines([row]))

    def append_samples(self, step: int, groups: Sequence[Group]) -> None:
        """Add the first replies of the first groups of a step. One that could not be graded has the
        reward null, and says why in `failed`."""
        if not self._active:
            return
        rows = [
            {
                "step": step,
                "question": group.problem.question,
                "answer": group.problem.answer,
                "replies": [t.text for t in group.trajectories],
                "rewards": [None if t.failed else t.reward for t in group.trajectories],
                "failed": [t.failed for t in group.trajectories],
            }
            for group in groups[:SAMPLES_A_STEP]
        ]
        append_bytes(self.samples_path, _lines(rows))

    def append_rollouts(self, lines: bytes) -> None:
        """Add groups of a step, as `kept_rollouts.rollout_lines` writes them."""
        if self._active and lines:
            append_bytes(self.rollouts_path, lines)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows of the steps so far."""
        return _read(self.metrics_path)

    def truncate(self, last_step: int) -> None:
        """Drop the lines of steps after `last_step`: they will be taken again. -1 drops all.
        Makes metrics.jsonl where it is not there."""
        if not self._active:
            return
        for path in (self.metrics_path, self.samples_path, self.evaluations_path):
            if path != self.metrics_path and not path.exists():
                continue
            kept = [row for row in _read(path) if row["step"] <= last_step]
            replace_file(path, _lines(kept))
        _cut(self.rollouts_path, last_step)

    def draw_plots(self) -> None:
        """Write plots.png from the metrics so far."""
        if self._active:
            draw_page(self.path)

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        if self._active:
            replace_file(self.path / name, f"{json.dumps(value, indent=2)}\n".encode())


def default_path(task: str) -> Path:
    """runs/<time>-<task>, the task's name made fit for a folder."""
    name = Path(task).stem.replace(":", "-")
    return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(_finite(row)) + "\n" for row in rows).encode()


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no number for NaN and infinity: null, so that other programs, and a run that is
    resumed, can read the row."""
    unknown = {k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    return {name: None if name in unknown else value for name, value in row.items()}


def _read(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: a process killed while it wrote may have left half of one."""
    if not path.exists():
        return []
    lines = read_lines(path, field="resume")
    return [
        parse_line(line, dict[str, Any], field="resume", example="a row of the run")
        for line in lines
        if line.ended
    ]


class _Step(msgspec.Struct):
    step: int


def _cut(path: Path, last_step: int) -> None:
    """Drop the lines of later steps from a file that may be large, without reading what is in
    them. It is shorter or gone then, and what is left stays where it was."""
    if not path.exists():
        return
    kept = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or _step_of(line) > last_step:
                break
            kept += len(line)
    os.truncate(path, kept)


def _step_of(line: bytes) -> float:
    try:
        return msgspec.json.decode(line, type=_Step).step
    except msgspec.DecodeError:
        return math.inf
