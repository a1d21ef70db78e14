"""A source of the dashboard with made-up figures, as of a run."""

from __future__ import annotations

import math
from functools import cached_property

from rollout.dashboard.figures import (
    Chart,
    Event,
    EventsPage,
    Figure,
    Line,
    SeriesPage,
    Snapshot,
)
from rollout.dashboard.numbers import gap, told
from rollout.dashboard.rollouts import (
    HEAD_CHARS,
    RolloutGroup,
    RolloutPage,
    RolloutQuery,
    RolloutRow,
    Sample,
    Tokens,
)
from rollout.dashboard.source import UnknownGroup

GROUP_SIZE = 8
PAGE_ROWS = 500


class MadeUpSource:
    """A run of `steps` steps with `groups` groups of rollouts. Step 7 has no finite figures.

    texts: prompts and replies, taken in turns.
    """

    def __init__(self, *, steps: int = 40, groups: int = 5, texts: tuple[str, ...] = ()) -> None:
        self.epoch = "made-up"
        self.steps = steps
        self.groups = groups
        self.texts = texts or ("Name the largest of 3, 9 and 4.", "The largest is 9.")
        self.events_seen = [
            Event(at=1e9 + step, kind="version", text=f"version {step}", x=step, version=str(step))
            for step in range(0, steps, 10)
        ]

    async def snapshot(self) -> Snapshot:
        figures = [
            Figure(name="reward", label="Reward", value=told(0.5), hint="Mean of the last step."),
            Figure(name="kl", label="Mismatch", value=told(math.nan), unit="nats"),
            Figure(name="speed", label="Generated", value=1234.5, unit="tokens/s"),
            Figure(name="kv", label="KV in use", value=0.25, unit="share"),
        ]
        charts = [
            Chart(name="reward", title="Reward", lines=[Line(name="reward", label="mean")]),
            Chart(
                name="ledger",
                title="Time",
                unit="s",
                stacked=True,
                lines=[
                    Line(name="t_roll", label="rollout"),
                    Line(name="t_train", label="training"),
                ],
            ),
        ]
        return Snapshot(
            title="made up",
            kind="run",
            at=1e9,
            state="training",
            tone="good",
            x="step",
            figures=figures,
            charts=charts,
        )

    async def series(self, since: int) -> SeriesPage:
        since = min(since, self.steps)
        end = min(self.steps, since + PAGE_ROWS)
        steps = range(since, end)
        reward = [gap(math.nan if s == 7 else 1 - math.exp(-s / 20)) for s in steps]
        return SeriesPage(
            first=since,
            next=end,
            x=[float(s) for s in steps],
            columns={
                "reward": reward,
                "t_roll": [2 + math.sin(s / 5) for s in steps],
                "t_train": [1.5 for _ in steps],
            },
            more=end < self.steps,
        )

    async def events(self, since: int) -> EventsPage:
        found = self.events_seen[since:]
        return EventsPage(first=since, next=len(self.events_seen), events=found)

    async def rollouts(self, query: RolloutQuery) -> RolloutPage:
        text = query.text.lower()
        rows = [row for row in self._rows if text in row.head.lower()]
        if query.step is not None:
            rows = [row for row in rows if row.step == query.step]
        rows = [row for row in rows if _within(row.reward, query)]
        number = [row for row in rows if query.sort != "reward" or _finite(row.reward)]
        rest = [row for row in rows if query.sort == "reward" and not _finite(row.reward)]
        number.sort(key=lambda row: getattr(row, query.sort), reverse=query.descending)
        known = number + rest
        page = known[query.offset : query.offset + query.limit]
        return RolloutPage(offset=query.offset, total=len(known), rows=page)

    async def rollout_group(self, group: str) -> RolloutGroup:
        if group not in {f"g{i}" for i in range(self.groups)}:
            raise UnknownGroup(f"there is no group {group[:100]!r}", field="group")
        number = int(group[1:])
        return RolloutGroup(
            group=group,
            step=number // 4,
            prompt=self.texts[number % len(self.texts)],
            answer="9",
            samples=[self._sample(number, i) for i in range(GROUP_SIZE)],
        )

    @cached_property
    def _rows(self) -> list[RolloutRow]:
        return [self._row(i) for i in range(self.groups * GROUP_SIZE)]

    def _text(self, index: int) -> str:
        return self.texts[(index + 1) % len(self.texts)]

    def _row(self, index: int) -> RolloutRow:
        group, sample = divmod(index, GROUP_SIZE)
        text = self._text(index)
        return RolloutRow(
            group=f"g{group}",
            sample=sample,
            step=group // 4,
            reward=told(_reward(index)),
            length=len(text.split()),
            head=text[:HEAD_CHARS],
            finish="stop",
        )

    def _sample(self, group: int, sample: int) -> Sample:
        index = group * GROUP_SIZE + sample
        text = self._text(index)
        words = [word if i == 0 else " " + word for i, word in enumerate(text.split(" "))]
        return Sample(
            sample=sample,
            text=text,
            reward=told(_reward(index)),
            length=len(words),
            finish="stop",
            tokens=Tokens(
                texts=words,
                logprobs=[gap(-0.05 * (i * 7 % 90)) for i, _ in enumerate(words)],
                entropies=[0.04 * (i * 5 % 70) for i, _ in enumerate(words)],
                versions=["3" if i < len(words) / 2 else "4" for i, _ in enumerate(words)],
            ),
        )


def _reward(index: int) -> float:
    return math.inf if index == 3 else float(index % 3 == 0)


def _finite(reward: float | str | None) -> bool:
    return isinstance(reward, int | float)


def _within(reward: float | str | None, query: RolloutQuery) -> bool:
    if query.reward_min is None and query.reward_max is None:
        return True
    if not isinstance(reward, int | float):
        return False
    low = -math.inf if query.reward_min is None else query.reward_min
    return low <= reward <= (math.inf if query.reward_max is None else query.reward_max)
