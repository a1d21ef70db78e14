"""Weights & Biases, if asked for: the library is imported only then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.errors import InvalidRequest
from recipes.settings.options import WandbMode


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

    def close(self, summary: dict[str, Any]) -> None:
        """Attach the summary and finish."""
        if self._run is not None:
            self._run.summary.update(summary)
            self._run.finish()


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
