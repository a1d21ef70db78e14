"""What a chat template does to turns that are over, found out by rendering small conversations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRequest
from rollout.turns.bridge import Render, bridge

_USER, _MORE = {"role": "user", "content": "a"}, {"role": "user", "content": "b"}
_PLAIN = {"role": "assistant", "content": "one"}
_THINKING = {"role": "assistant", "content": "<think>\nwhy\n</think>\n\none"}


@dataclass(frozen=True, kw_only=True)
class TemplateTurns:
    """append_only: the next prompt begins with the last one and its reply, as text.
    keeps_thinking: so it does where the reply has a thinking block. separator_kept: the bridge is
    what the template itself writes between two turns. turn_end: what it writes behind a reply;
    None where that cannot be told."""

    append_only: bool
    keeps_thinking: bool
    separator_kept: bool
    turn_end: str | None

    @property
    def told(self) -> dict[str, Any]:
        """As clients are told it."""
        return {
            "append_only": self.append_only,
            "keeps_thinking": self.keeps_thinking,
            "separator_kept": self.separator_kept,
            "turn_end": self.turn_end,
        }


def probe(render: Render) -> TemplateTurns:
    """Render two turns, the second with the first before it, and compare."""
    between = bridge(render, [_USER], [_MORE])
    return TemplateTurns(
        append_only=_appends(render, _PLAIN["content"], _PLAIN) is not None,
        keeps_thinking=_appends(render, _THINKING["content"], _THINKING) is not None,
        separator_kept=between is not None
        and _appends(render, _PLAIN["content"], _PLAIN) == between,
        turn_end=_turn_end(render),
    )


def _appends(render: Render, reply: str, message: dict[str, str]) -> str | None:
    """What the second prompt adds to the first and its reply; None if it changes them."""
    try:
        first, second = render([_USER], True), render([_USER, message, _MORE], True)
    except InvalidRequest:
        return None
    said = first + reply
    return second[len(said) :] if second.startswith(said) else None


def _turn_end(render: Render) -> str | None:
    try:
        text = render([_USER, _PLAIN], False)
    except InvalidRequest:
        return None
    _, found, end = text.rpartition("one")
    return end if found else None
