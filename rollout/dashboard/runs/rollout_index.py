"""All replies that a run kept, as rows that are sorted and searched without reading files again.

In memory are, of each reply, its row, and of prompts and replies together some `_TEXT_CHARS`
characters to search in; what lies beyond is searched in the file. Tokens are read when a group is
looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rollout.dashboard.numbers import told
from rollout.dashboard.rollouts import (
    HEAD_CHARS,
    RolloutGroup,
    RolloutPage,
    RolloutQuery,
    RolloutRow,
    SortKey,
)
from rollout.dashboard.runs.kept_rollouts import KeptGroup, read_group, read_tokens, reward_of
from rollout.dashboard.runs.line_tail import LineTail
from rollout.dashboard.source import UnknownGroup

_TEXT_CHARS = 64 << 20
_AT_ONCE = 16 << 20
"""Bytes of lines that are in memory beside each other: a long run writes gigabytes of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """One group. start: of its line in the file. texts: prompt and replies, folded; None where
    they are to be read."""

    name: str
    number: int
    start: int
    texts: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reply:
    """One reply. reward: None where there is none, or none that is finite."""

    row: RolloutRow
    reward: float | None
    entry: _Entry


class RolloutIndex:
    """Over one file. text_chars: most characters that are kept in memory for searches."""

    def __init__(self, path: Path, *, text_chars: int = _TEXT_CHARS) -> None:
        self._tail = LineTail(path)
        self._text_chars = text_chars
        self._empty()

    def __len__(self) -> int:
        return len(self._replies)

    def refresh(self) -> None:
        """Take in the groups that are new. Raises InvalidRequest (`run`)."""
        more = True
        while more:
            found = self._tail.look(most_bytes=_AT_ONCE)
            more = found.more
            if found.anew:
                self._empty()
            for start, line in zip(found.starts, found.lines, strict=True):
                group = read_group(line)
                if group is not None:
                    self._add(start, group)

    def page(self, query: RolloutQuery) -> RolloutPage:
        """The replies that match, in the order asked for."""
        found = list(self._matching(query))
        with_key, without = _split(found, query.sort)
        # Python's sort keeps the order of equals, the other way round too.
        with_key.sort(key=_KEYS[query.sort], reverse=query.descending)
        ordered = [*with_key, *without]
        rows = [reply.row for reply in ordered[query.offset : query.offset + query.limit]]
        return RolloutPage(offset=query.offset, total=len(ordered), rows=rows)

    def group(self, name: str) -> RolloutGroup:
        """One group with its tokens, read from the file. Raises UnknownGroup."""
        entry = self._entries.get(name)
        line = None if entry is None else self._tail.read_at(entry.start)
        found = None if line is None else read_tokens(line, name)
        if found is None:
            raise UnknownGroup(f"the run keeps no group {name[:100]!r}", field="group")
        return found

    def close(self) -> None:
        """Close the file."""
        self._tail.close()

    def _empty(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._replies: list[_Reply] = []
        self._of_step: dict[int, int] = {}
        self._chars_left = self._text_chars

    def _add(self, start: int, group: KeptGroup) -> None:
        step = int(group.step)
        place = self._of_step[step] = self._of_step.get(step, 0) + 1
        entry = _Entry(
            name=f"{step}-{place}",
            number=len(self._entries),
            start=start,
            texts=self._remembered(group),
        )
        self._entries[entry.name] = entry
        for sample, reply in enumerate(group.samples):
            reward = reward_of(reply)
            row = RolloutRow(
                group=entry.name,
                sample=sample,
                step=step,
                reward=told(reward),
                length=reply.length,
                head=reply.text[:HEAD_CHARS],
                finish=reply.finish,
            )
            finite = reward if reward is not None and math.isfinite(reward) else None
            self._replies.append(_Reply(row=row, reward=finite, entry=entry))

    def _remembered(self, group: KeptGroup) -> tuple[str, ...] | None:
        texts = _folded(group)
        num = sum(map(len, texts))
        if num > self._chars_left:
            return None
        self._chars_left -= num
        return texts

    def _matching(self, query: RolloutQuery) -> Iterator[_Reply]:
        text = query.text.casefold()
        low = -math.inf if query.reward_min is None else query.reward_min
        high = math.inf if query.reward_max is None else query.reward_max
        bounded = query.reward_min is not None or query.reward_max is not None
        texts: tuple[str, ...] = ()
        entry: _Entry | None = None
        for reply in self._replies:
            if query.step is not None and reply.row.step != query.step:
                continue
            if bounded and not (reply.reward is not None and low <= reply.reward <= high):
                continue
            if text:
                if reply.entry is not entry:
                    entry, texts = reply.entry, self._texts(reply.entry)
                if text not in texts[0] and text not in texts[1 + reply.row.sample]:
                    continue
            yield reply

    def _texts(self, entry: _Entry) -> tuple[str, ...]:
        if entry.texts is not None:
            return entry.texts
        line = self._tail.read_at(entry.start)
        group = None if line is None else read_group(line)
        if group is None:
            raise UnknownGroup(f"{self._tail.path} changed; look again", field="group")
        return _folded(group)


def _folded(group: KeptGroup) -> tuple[str, ...]:
    """The prompt, then the replies."""
    return tuple(text.casefold() for text in (group.prompt, *(r.text for r in group.samples)))


def _number_of_reward(reply: _Reply) -> float:
    return 0.0 if reply.reward is None else reply.reward


_KEYS: dict[SortKey, Callable[[_Reply], float]] = {
    "step": lambda reply: reply.row.step,
    "group": lambda reply: reply.entry.number,
    "reward": _number_of_reward,
    "length": lambda reply: reply.row.length,
}


def _split(replies: list[_Reply], sort: SortKey) -> tuple[list[_Reply], list[_Reply]]:
    """Those that have what is sorted by, and the others."""
    if sort != "reward":
        return replies, []
    return (
        [reply for reply in replies if reply.reward is not None],
        [reply for reply in replies if reply.reward is None],
    )
