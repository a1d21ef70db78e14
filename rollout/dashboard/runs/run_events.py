"""What happened in a run, told from its rows: weight updates and evaluations.

Rows carry no time of day. The last one was written when metrics.jsonl was last changed, and each
before it as much earlier as the steps between them took, so moments are right to the time that
checkpoints take, and steps exactly.
"""

from __future__ import annotations

from rollout.dashboard.figures import Event
from rollout.dashboard.runs.run_rows import Row

_TOOK = ("timing_s/step", "timing_s/eval")
_LAST_MOMENT = 253402300799.0
"""The end of the year 9999, in Unix seconds."""


def events_of(rows: list[Row], *, before: float) -> list[Event]:
    """Events of consecutive rows. before: Unix seconds when the first of them began."""
    events: list[Event] = []
    at = before
    for row in rows:
        at += seconds_of(row)
        # The page writes moments as dates, of which there is a last one.
        events += _of_row(row, min(max(at, 0.0), _LAST_MOMENT))
    return events


def seconds_of(row: Row) -> float:
    """How long a row took, as far as it says so."""
    found = (row.figures.get(name, 0.0) for name in _TOOK)
    return sum(seconds for seconds in found if 0 <= seconds < 1e9)


def _of_row(row: Row, at: float) -> list[Event]:
    found: list[Event] = []
    step, version = row.step, row.figures.get("weight_version")
    if version is not None:
        seconds = row.figures.get("push/seconds")
        found.append(
            Event(
                at=at,
                x=step,
                kind="version",
                text=f"weights {version:g} after step {step:g}",
                seconds=seconds if seconds is not None and 0 <= seconds < 1e9 else None,
                version=f"{version:g}",
            )
        )
    measured = [name for name in ("eval/accuracy", "eval/loss") if name in row.figures]
    if measured:
        told = ", ".join(
            f"{name.removeprefix('eval/')} {row.figures[name]:.4g}" for name in measured
        )
        text = f"held out after step {step:g}: {told}"
        found.append(Event(at=at, x=step, kind="note", text=text))
    return found
