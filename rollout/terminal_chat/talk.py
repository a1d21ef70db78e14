"""Who is talked to: a server, or a replica."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from rollout.terminal_chat.chat_config import Settings

Turn = Mapping[str, str]
"""A message of chat: role and content."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one token, or several that came together, added to a reply.

    kind: of the answer, or of the thinking before it. tokens: their texts and logprobs, which add
    up to `text`; empty where these were not asked for. num_tokens: of the whole reply so far.
    """

    text: str
    kind: Literal["answer", "thought"] = "answer"
    tokens: tuple[tuple[str, float], ...] = ()
    num_tokens: int


class Talk(Protocol):
    """One to talk to."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    def reply(self, turns: Sequence[Turn], settings: Settings) -> Generator[Piece, None, None]:
        """The reply to a conversation, piece by piece. Closing the generator ends the reply there.
        Raises an error of the tree, after which it may be asked again."""
        ...

    def close(self) -> None:
        """Let go of it. Idempotent."""
        ...
