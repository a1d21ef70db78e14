"""Weights & Biases, if asked for: the library is imported only then."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from engine.errors import InvalidRequest
from recipes.settings.options import WandbMode
from recipes.types import Group, Trajectory

TABLE_ROWS = 32
"""Most replies of a step in the table of rollouts."""
COLUMNS = ("step", "prompt", "reply", "reward", "failure", "age", "versions")


class Tracker:
    """Logs rows of metrics by step; does nothing when off."""

    def __init__(self, mode: WandbMode, folder: Path, config: dict[str, Any]) -> None:
        self._run: Any = None
        if mode != "off":
            self._run = _start(mode, folder, config)

    def log(self, row: dict[str, Any]) -> None:
        """Log the row of one step."""
        if self._run is not None:
            self._run.log(row, step=row["step"])

    def log_rollouts(self, step: int, groups: Sequence[Group]) -> None:
        """Log the first replies of a step as a table, at most `TABLE_ROWS`.

        age: updates between the weights that sampled a reply's first token and those that the step
        began with. versions: how many weights sampled it."""
        if self._run is None:
            return
        import wandb

        replies = ((group, t) for group in groups for t in group.trajectories)
        rows = [_row(step, *reply) for reply in islice(replies, TABLE_ROWS)]
        table = wandb.Table(columns=list(COLUMNS), data=rows)
        self._run.log({"rollouts": table}, step=step)

    def close(self, summary: dict[str, Any]) -> None:
        """Attach the summary and finish."""
        if self._run is not None:
            self._run.summary.update(summary)
            self._run.finish()


def _row(step: int, group: Group, reply: Trajectory) -> list[Any]:
    oldest = min((span.version for span in reply.spans), default=step - 1)
    versions = len({span.version for span in reply.spans})
    question = group.problem.question
    age = step - 1 - oldest
    reward = None if reply.failed else reply.reward
    return [step, question, reply.text, reward, reply.failed, age, versions]


def _start(mode: WandbMode, folder: Path, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise InvalidRequest(
            f"wandb: --wandb {mode} needs the wandb package: pip install -e '.[wandb]'",
            field="wandb",
        ) from error
    return wandb.init(
        project="slipstream",
        name=folder.name,
        dir=str(folder),
        config=config,
        mode="offline" if mode == "offline" else "online",
    )
