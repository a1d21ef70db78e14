"""What the page draws above the rollouts: figures, charts over time, and a timeline.

The page knows no figure by its name: a source says what there is, what it is called and how it is
drawn, so that the page of a server and that of a run are one.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from rollout.dashboard.numbers import Number

Kind = Literal["server", "run"]
Tone = Literal["plain", "good", "warn", "bad"]
Unit = Literal["", "tokens/s", "tokens", "s", "share", "requests", "GiB", "nats"]
"""What a number counts. "share" is of 1 and shown in percent; "" is a bare number."""
EventKind = Literal["version", "update", "pause", "resume", "sleep", "wake", "note", "error"]


class Figure(Struct, frozen=True, kw_only=True):
    """One present figure. label: a few words. value: a number as `numbers.told` gives it, or a
    short text. hint: a sentence that says what it is."""

    name: str
    label: str
    value: Number
    unit: Unit = ""
    hint: str = ""
    tone: Tone = "plain"


class Line(Struct, frozen=True, kw_only=True):
    """One line of a chart: the column of `SeriesPage` that it draws, and its words."""

    name: str
    label: str


class Chart(Struct, frozen=True, kw_only=True):
    """A chart of one or several lines over the same x. stacked: areas on top of each other, as
    of a ledger. hint: a sentence that says what is seen."""

    name: str
    title: str
    lines: list[Line]
    unit: Unit = ""
    stacked: bool = False
    hint: str = ""


class Snapshot(Struct, frozen=True, kw_only=True):
    """What is true now.

    at: Unix seconds. state: a word or two ("serving", "paused", "finished"), with its tone.
    x: what the charts' x is, Unix seconds or steps of training. charts: those to draw, in order;
    one whose columns never had a value is left out by the page. rollouts: "" if there is an
    inspector, else a sentence that says why not. chat: name of the model that the same address
    answers /v1/chat/completions for; "" where there is none.
    """

    title: str
    kind: Kind
    at: float
    state: str
    tone: Tone = "plain"
    model: str = ""
    x: Literal["time", "step"] = "time"
    figures: list[Figure] = []
    charts: list[Chart] = []
    rollouts: str = ""
    chat: str = ""


class SeriesPage(Struct, frozen=True, kw_only=True):
    """Rows of all series from a cursor on.

    first: index of the first row here, which is later than asked for where older ones were
    forgotten. next: the cursor to go on with. more: whether there are rows behind these already.
    x: one number a row, never falling. columns: by name, as long as `x`, None where a row has no
    value or one that is not finite. A column may begin late: rows before have None.
    """

    first: int
    next: int
    x: list[float]
    columns: dict[str, list[float | None]]
    more: bool = False


class Event(Struct, frozen=True, kw_only=True):
    """Something that happened at a moment. at: Unix seconds. x: where it is on the charts, in
    their unit. text: a short sentence. seconds: how long it took, if that is known. version: of
    the weights from then on, if it is about them."""

    at: float
    kind: EventKind
    text: str
    x: float | None = None
    seconds: float | None = None
    version: str = ""


class EventsPage(Struct, frozen=True, kw_only=True):
    """Events from a cursor on, oldest first; first and next as in `SeriesPage`."""

    first: int
    next: int
    events: list[Event]
    more: bool = False


class Live(Struct, frozen=True, kw_only=True):
    """One message of the live stream: the present, and what is new behind the reader's cursors.
    epoch: cursors of another epoch count rows of something else; the reader begins anew."""

    epoch: str
    snapshot: Snapshot
    series: SeriesPage
    events: EventsPage
