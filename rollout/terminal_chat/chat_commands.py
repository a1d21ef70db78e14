"""What a line that begins with a slash does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from engine.errors import InvalidRequest
from engine.protocol.types import INT64_MAX
from rollout.requests.nearest import nearest
from rollout.terminal_chat.chat_config import Settings
from rollout.terminal_chat.talk import Turn

HELP = """\
/system TEXT       set the system's turn; without a text, remove it
/temperature X     sample at X; 0 takes the likeliest token; without a number, the default
/seed N            repeat replies by a seed; without a number, draw anew each time
/logprobs          show how likely each token was, or no longer
/undo              take back the last message and its reply
/reset             begin anew; the settings stay
/help              this
/quit              leave, as Ctrl-D; Ctrl-C stops a reply
A message that begins with a slash is written with two."""


@dataclass
class Chat:
    """A conversation, which commands change. turns: without the system's."""

    settings: Settings
    turns: list[Turn] = field(default_factory=list)
    over: bool = False

    def asked(self) -> list[Turn]:
        """The conversation as it is sent."""
        system = self.settings.system
        return [*([{"role": "system", "content": system}] if system else []), *self.turns]


def execute(chat: Chat, line: str) -> str:
    """Do what a line says; what to tell of it. Raises InvalidRequest naming the command."""
    name, _, rest = line.partition(" ")
    found = _COMMANDS.get(name)
    if found is None:
        meant = nearest(name, _COMMANDS)
        raise InvalidRequest(
            f"there is no {name}; " + (f"did you mean {meant}?" if meant else "/help lists all"),
            field=name,
        )
    return found(chat, rest.strip())


def _system(chat: Chat, text: str) -> str:
    chat.settings = replace(chat.settings, system=text)
    return f"system: {text}" if text else "no system turn"


def _temperature(chat: Chat, text: str) -> str:
    value = float(_number(text, float, "/temperature", 0, 1e6)) if text else None
    chat.settings = replace(chat.settings, temperature=value)
    return "the default temperature" if value is None else f"temperature {value:g}"


def _seed(chat: Chat, text: str) -> str:
    value = int(_number(text, int, "/seed", -INT64_MAX - 1, INT64_MAX)) if text else None
    chat.settings = replace(chat.settings, seed=value)
    return "another seed each time" if value is None else f"seed {value}"


def _number(text: str, kind: Callable[[str], float], name: str, least: float, most: float) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise InvalidRequest(
            f"{name} {text[:50]}: give a number from {least:g} to {most:g}", field=name
        )
    return value


def _logprobs(chat: Chat, _: str) -> str:
    chat.settings = replace(chat.settings, logprobs=not chat.settings.logprobs)
    return f"logprobs {'on' if chat.settings.logprobs else 'off'}"


def _undo(chat: Chat, _: str) -> str:
    if not chat.turns:
        return "there is nothing to undo"
    *chat.turns, asked, _reply = chat.turns
    return f"took back: {asked['content']}"


def _reset(chat: Chat, _: str) -> str:
    chat.turns.clear()
    return "a new conversation"


def _help(chat: Chat, _: str) -> str:
    return HELP


def _quit(chat: Chat, _: str) -> str:
    chat.over = True
    return ""


_COMMANDS: Mapping[str, Callable[[Chat, str], str]] = MappingProxyType(
    {
        "/system": _system,
        "/temperature": _temperature,
        "/seed": _seed,
        "/logprobs": _logprobs,
        "/undo": _undo,
        "/reset": _reset,
        "/help": _help,
        "/quit": _quit,
    }
)
