"""What a person watches: a live table in a terminal, one line a step anywhere else."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from recipes.actors.actor import Generation

logger = logging.getLogger(__name__)

VISIBLE_ROWS = 24

Row = dict[str, Any]

Columns = tuple[tuple[str, str, Callable[[float], str]], ...]
"""Title, name of the figure, and how it is written."""

COLUMNS: Columns = (
    ("step", "step", "{:.0f}".format),
    ("reward", "reward", "{:.3f}".format),
    ("held-out", "eval/accuracy", "{:.3f}".format),
    ("entropy", "entropy", "{:.2f}".format),
    ("clip", "clip_ratio/region_mean", "{:.3f}".format),
    ("Δlogp", "sampling/sampling_logp_difference/mean", "{:.1e}".format),
    ("max", "sampling/sampling_logp_difference/max", "{:.1e}".format),
    ("k3", "rollout_corr/k3_kl", "{:.1e}".format),
    ("grad", "grad_norm", "{:.2f}".format),
    ("length", "completions/mean_length", "{:.1f}".format),
    ("tok/s", "perf/rollout_tokens_per_s", "{:.0f}".format),
    ("generate", "timing_s/generate", "{:.2f}".format),
    ("score", "timing_s/score", "{:.2f}".format),
    ("train", "timing_s/train", "{:.2f}".format),
    ("push", "timing_s/push", "{:.2f}".format),
    ("other", "timing_s/other", "{:.2f}".format),
    ("step s", "timing_s/step", "{:.2f}".format),
)

SFT_COLUMNS: Columns = (
    COLUMNS[0],
    ("loss", "loss", "{:.4f}".format),
    ("held-out loss", "eval/loss", "{:.4f}".format),
    ("held-out", "eval/accuracy", "{:.3f}".format),
    ("grad", "grad_norm", "{:.2f}".format),
    ("rate", "learning_rate", "{:.1e}".format),
    ("tokens", "perf/learnt_tokens", "{:.0f}".format),
    ("step s", "timing_s/step", "{:.2f}".format),
)
"""Those of a supervised run."""

# Dropped from the right where a terminal is too narrow for all; the log lines have them.
BY_IMPORTANCE = (
    *("step", "reward", "held-out", "step s", "generate", "train", "push", "score", "other"),
    *("loss", "held-out loss"),
    *("tok/s", "Δlogp", "entropy", "length", "clip", "grad", "k3", "max", "rate", "tokens"),
)
CELL_WIDTH = 7
"""Of the widest figures, such as 1.3e-05."""


def cells(row: Row, columns: Columns = COLUMNS) -> list[str]:
    """The row as text, one cell a column, "-" where it has no such figure."""
    return [form(row[key]) if key in row else "-" for _, key, form in columns]


def fitting(width: int, columns: Columns = COLUMNS) -> set[str]:
    """Titles of the most important columns that a line of `width` characters has room for."""
    shown: set[str] = set()
    there = {title for title, _, _ in columns}
    for title in (title for title in BY_IMPORTANCE if title in there):
        width -= max(len(title), CELL_WIDTH if title in ("Δlogp", "max", "k3") else 5) + 1
        if width < 0:
            break
        shown.add(title)
    return shown


class Display:
    """Shows rows as they come. Use as a context manager around the run.

    console: where to; a live table if it is a terminal, else log lines. columns: figures shown.
    """

    def __init__(
        self,
        title: str,
        total_steps: int,
        console: Console | None = None,
        *,
        columns: Columns = COLUMNS,
    ) -> None:
        console = Console(stderr=True) if console is None else console
        self._title = title
        self._columns = columns
        self._rows: list[Row] = []
        self._note = "loading the model"
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[generation]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task(self._note, total=total_steps, generation="")
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(console=console, refresh_per_second=2, get_renderable=self._render)

    def note(self, text: str) -> None:
        """Say what is going on now."""
        self._note = text
        self._bar.update(self._task, description=text)
        if self._live is None:
            logger.info("%s", text)

    def pin(self, text: str) -> None:
        """Say something that stays to be seen. Any thread may."""
        self._title = f"{self._title}\n{text}"
        if self._live is None:
            logger.info("%s", text)

    def generating(self, now: Generation) -> None:
        """Show how the rollout under way goes; in a terminal only."""
        self._bar.update(
            self._task,
            generation=f"{now.num_done}/{now.num_requests} replies, "
            f"{now.tokens_per_s:,.0f} tok/s, KV {now.kv_use:.0%}",
        )

    def show(self, row: Row) -> None:
        """Show the figures of one finished step."""
        self._rows.append(row)
        self._bar.update(self._task, completed=row["step"], description="training")
        if self._live is None:
            named = zip(self._columns, cells(row, self._columns), strict=True)
            logger.info("  ".join(f"{title} {cell}" for (title, _, _), cell in named))

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def _render(self) -> Group:
        shown = fitting(self._bar.console.width, self._columns)
        table = Table(title=self._title, box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for title, _, _ in self._columns:
            if title in shown:
                table.add_column(title, justify="right", no_wrap=True)
        for row in self._rows[-VISIBLE_ROWS:]:
            named = zip(self._columns, cells(row, self._columns), strict=True)
            table.add_row(*(cell for (title, _, _), cell in named if title in shown))
        return Group(table, self._bar)
