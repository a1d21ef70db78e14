"""One page of curves of a run, or of several over each other, from their metrics.jsonl alone.

    python -m recipes.run.plots runs/A [runs/B ...] [--out page.png]

A run draws its own page as plots.png, now and then and at its end.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import InvalidRequest
from rollout.offline import replace_file, report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]

PAGE = "plots.png"


@dataclass(frozen=True, kw_only=True)
class Curves:
    """One run. rows: of its metrics.jsonl. evaluations: of its evaluations.jsonl, which has those
    before and after training too; without, what the rows say of evaluations is drawn."""

    name: str
    rows: Rows
    evaluations: Rows = ()


@dataclass(frozen=True)
class Panel:
    """One picture of the page. figures: of a row, each with the label of its curve."""

    title: str
    figures: tuple[tuple[str, str], ...]
    log: bool = False


DIFFERENCE = "sampling/sampling_logp_difference"
PANELS = (
    Panel("reward, sampled and held out", (("reward", "sampled"), ("eval/accuracy", "held out"))),
    Panel("entropy, nats a token", (("entropy", "entropy"),)),
    Panel(
        "train/rollout mismatch of logprobs",
        ((f"{DIFFERENCE}/mean", "mean"), (f"{DIFFERENCE}/max", "max")),
        log=True,
    ),
    Panel("train/rollout k3 KL", (("rollout_corr/k3_kl", "k3"),), log=True),
    Panel(
        "reply length, tokens",
        (("completions/mean_length", "mean"), ("completions/max_length", "longest")),
    ),
)
MARGINS = {"left": 0.05, "right": 0.985, "bottom": 0.07, "top": 0.9, "wspace": 0.2, "hspace": 0.3}
PHASE = "timing_s/"
LARGEST = 1e30
"""What is larger is not drawn: the margins of an axis would overflow."""
NO_PHASE = frozenset({"timing_s/step", "timing_s/eval"})
STYLES = ("-", "--", ":", "-.")


def draw(runs: Sequence[Curves]) -> bytes:
    """The page as PNG. What a run has no number of, or none that is finite, is not drawn."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.5))
    # A layout that measures every label first takes as long again as drawing.
    figure.subplots_adjust(**MARGINS)
    figure.suptitle(", ".join(run.name for run in runs), parse_math=False)
    places = figure.subplots(2, 3).flat
    for panel in PANELS:
        _draw_panel(next(places), panel, runs)
    _draw_phases(next(places), runs)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    return picture.getvalue()


def read_curves(folder: Path) -> Curves:
    """The curves of a run's folder. Raises InvalidRequest (`run`) if it holds no metrics."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise InvalidRequest(
            f"run: there is no {path}; give the folder of a run that has taken a step", field="run"
        )
    return Curves(
        name=folder.resolve().name,
        rows=_read(path),
        evaluations=_read(folder / "evaluations.jsonl"),
    )


def draw_page(folder: Path) -> None:
    """Write the page of a run into its folder; nothing where it has taken no step.

    Raises DiskFull."""
    if (folder / "metrics.jsonl").is_file():
        replace_file(folder / PAGE, draw([read_curves(folder)]))


def _read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file; none if it is not there. A picture does without a line that is cut off or is
    no row, and numbers that are not finite are no error."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def points(rows: Rows, figure: str, *, log: bool = False) -> tuple[list[float], list[float]]:
    """Steps and values of a figure, where both are finite numbers; above 0 for a log axis."""
    steps, values = [], []
    for row in rows:
        step, value = _number(row.get("step")), _number(row.get(figure))
        if step is not None and value is not None and (value > 0 or not log):
            steps.append(step)
            values.append(value)
    return steps, values


def _number(value: object) -> float | None:
    """A finite number that an axis can hold, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= LARGEST else None


def _draw_panel(axes: Axes, panel: Panel, runs: Sequence[Curves]) -> None:
    drawn = False
    for number, run in enumerate(runs):
        for style, (figure, label) in zip(STYLES, panel.figures, strict=False):
            measured = figure.startswith("eval/")
            rows = run.evaluations if measured and run.evaluations else run.rows
            steps, values = points(rows, figure, log=panel.log)
            if not values:
                continue
            drawn = True
            marker = "o" if measured or len(values) == 1 else None
            axes.plot(
                steps,
                values,
                style,
                color=f"C{number}" if len(runs) > 1 else None,
                marker=marker,
                markersize=3,
                label=label if len(runs) == 1 else f"{run.name}: {label}",
            )
    _finish(axes, panel.title, drawn=drawn)
    if drawn and panel.log:
        axes.set_yscale("log")


def _draw_phases(axes: Axes, runs: Sequence[Curves]) -> None:
    """Seconds of each step: stacked by phase for one run, in sum for several."""
    if len(runs) > 1:
        _draw_panel(axes, Panel("seconds a step", (("timing_s/step", "step"),)), runs)
        return
    placed = [(_number(row.get("step")), row) for run in runs for row in run.rows]
    steps = [step for step, _ in placed if step is not None]
    rows = [row for step, row in placed if step is not None]
    names = dict.fromkeys(key for row in rows for key in row if key.startswith(PHASE))
    phases = {
        name.removeprefix(PHASE): [max(_number(row.get(name)) or 0.0, 0.0) for row in rows]
        for name in names
        if name not in NO_PHASE
    }
    if phases:
        axes.stackplot(steps, *phases.values(), labels=list(phases), step="mid")
    _finish(axes, "seconds a step, by phase", drawn=bool(phases))


def _finish(axes: Axes, title: str, *, drawn: bool) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if drawn:
        for text in axes.legend(fontsize=7, loc="upper left").get_texts():
            text.set_parse_math(False)
    else:
        axes.text(0.5, 0.5, "no figures", ha="center", transform=axes.transAxes)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the page of the runs named on the command line. Returns the exit code: 2 for a folder
    that is no run, explained in a line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.run.plots", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", help="the picture; by default plots.png of the first run")
    given = parser.parse_args(argv)
    folders = [Path(run) for run in given.runs]
    out = Path(given.out) if given.out else folders[0] / PAGE
    try:
        page = draw([read_curves(folder) for folder in folders])
        if not out.parent.is_dir():
            raise InvalidRequest(f"out: there is no folder {out.parent}", field="out")
        replace_file(out, page)
    except (Exception, KeyboardInterrupt) as error:
        code = report(error, advice={})
        if code is None:
            raise
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
