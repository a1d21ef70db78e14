"""Sessions, which keep the tokens of a conversation between turns: commands and their replies."""

from __future__ import annotations

import msgspec
import numpy as np
from msgspec import Struct

from engine.protocol.types import ClientId, Count, IntArray, Seconds


class OpenSession(Struct, frozen=True, kw_only=True, tag="open_session"):
    """Open a session; requests name it by `Request.session`. `Reply.session` has its id.

    session: its id, letters, digits and `._-`; "" for one that the engine draws. max_tokens: most
    tokens of all turns together, 0 for the model's context. timeout_s: a session that is idle for
    longer is closed; None for the engine's default. Raises InvalidRequest naming the field,
    StoreFull.
    """

    session: ClientId = ""
    max_tokens: Count = 0
    timeout_s: Seconds | None = None


class CloseSession(Struct, frozen=True, kw_only=True, tag="close_session"):
    """Close a session, whose turn in progress ends with an abort. Raises UnknownSession."""

    session: ClientId


class GetSession(Struct, frozen=True, kw_only=True, tag="get_session"):
    """Ask for a session with its tokens. Raises UnknownSession."""

    session: ClientId


class SessionState(Struct, frozen=True, kw_only=True):
    """A session between two commands.

    num_turns: turns that ended, by a stop or a length. busy: a turn is in progress. held_tokens:
    tokens whose KV stays between turns; the rest is found in the prefix cache or computed again.
    token_ids: int32 [n], of all turns, prompts and outputs; empty but for `GetSession`.
    """

    session: str
    max_tokens: Count
    timeout_s: float
    num_tokens: Count = 0
    num_turns: Count = 0
    busy: bool = False
    held_tokens: Count = 0
    token_ids: IntArray = msgspec.field(default_factory=lambda: np.zeros(0, np.int32))


SessionCommand = OpenSession | CloseSession | GetSession
