"""What the inspector asks for and shows: rows of rollouts, and one group with its tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from rollout.dashboard.numbers import Number

MAX_ROWS = 500
"""Most rows of one page."""
HEAD_CHARS = 160
"""Most characters of a reply in a row."""

SortKey = Literal["step", "group", "reward", "length"]


class RolloutQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which rollouts, in which order.

    offset, limit: the page. sort: rows without the number, or with one that is not finite, come
    last either way; ties keep the order in which they were made. step: those of this step alone.
    reward_min, reward_max: bounds, both included. text: part of the prompt or the reply, in any
    case.
    """

    offset: Annotated[int, Meta(ge=0, le=2**53)] = 0
    limit: Annotated[int, Meta(ge=1, le=MAX_ROWS)] = 100
    sort: SortKey = "step"
    descending: bool = True
    step: Annotated[int, Meta(ge=0, le=2**53)] | None = None
    reward_min: float | None = None
    reward_max: float | None = None
    text: Annotated[str, Meta(max_length=1000)] = ""


class RolloutRow(Struct, frozen=True, kw_only=True):
    """One rollout in the list. group: what `Source.rollout_group` takes. sample: its number within
    the group. length: tokens. head: the first `HEAD_CHARS` characters of the reply."""

    group: str
    sample: int
    step: int
    reward: Number
    length: int
    head: str
    finish: str = ""


class RolloutPage(Struct, frozen=True, kw_only=True):
    """Rows of a query from `offset` on. total: all that match."""

    offset: int
    total: int
    rows: list[RolloutRow]


class Tokens(Struct, frozen=True, kw_only=True):
    """The tokens of a reply, a list a property, all of one length; None for a property that is not
    known. texts: joined they are about the reply. logprobs, entropies: in nats, None within for
    what is not finite. versions: which weights sampled each token."""

    texts: list[str]
    logprobs: list[float | None] | None = None
    entropies: list[float | None] | None = None
    versions: list[str] | None = None


class Sample(Struct, frozen=True, kw_only=True):
    """One reply of a group. note: what else is known of it, such as why it has no reward."""

    sample: int
    text: str
    reward: Number
    length: int
    finish: str = ""
    note: str = ""
    tokens: Tokens | None = None


class RolloutGroup(Struct, frozen=True, kw_only=True):
    """A prompt and its samples. answer: what the task holds to be right, if there is such."""

    group: str
    step: int
    prompt: str
    samples: list[Sample]
    answer: str = ""
