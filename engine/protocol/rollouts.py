"""Rollouts that are captured from OpenAI calls: commands, what is recorded, and their replies."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct

from engine.protocol.requests import FinishReason, VersionSpan
from engine.protocol.routes import RouteArray
from engine.protocol.types import (
    ClientId,
    Count,
    Float32,
    FloatArray,
    IntArray,
    LogprobLaw,
    Message,
    Seconds,
)

Digest = Annotated[bytes, Meta(max_length=64)]
"""SHA-256 of something that is compared and not kept."""

Digests = Annotated[list[Digest], Meta(max_length=1 << 16)]

History = Literal["kept", "template"]

PromptText = Annotated[str, Meta(max_length=1 << 28)]


class OpenRollout(Struct, frozen=True, kw_only=True, tag="open_rollout"):
    """Open a rollout. rollout: its id, as that of a session; timeout_s: as of a session. history:
    kept, a conversation goes on from the tokens that were sampled, whatever the chat template does
    to old turns; template, only where the template writes the same text. return_routed_experts: the
    routes of every call are recorded (`Request.return_routed_experts`), whether its client asks for
    them or not. Raises InvalidRequest naming the field, StoreFull."""

    rollout: ClientId = ""
    timeout_s: Seconds | None = None
    history: History = "kept"
    return_routed_experts: bool = False


class PromptQuery(Struct, frozen=True, kw_only=True):
    """Which branch a prompt goes on from. text: what its tokens say, special ones included; ""
    where the client sent ids. keys: of the beginnings of its conversation, shortest first."""

    text: PromptText = ""
    keys: Digests = msgspec.field(default_factory=list)


class BeginCall(Struct, frozen=True, kw_only=True, tag="begin_call"):
    """A call with these prompts begins; until `EndCall` the rollout is incomplete. `Reply.rollout`
    has its number, and what each prompt goes on from. Raises UnknownRollout, StoreFull."""

    rollout: ClientId
    prompts: list[PromptQuery]


class CallSample(Struct, frozen=True, kw_only=True):
    """One sequence of a call.

    prompt_ids: int32, the whole prompt; token_ids: int32 [n], logprobs: float32 [n], spans: of the
    output. temperature, logprob_law: those of the logprobs. text_bytes, text_digest: of the text of
    prompt and output, special tokens included, in UTF-8. key: of the conversation with the reply;
    empty for calls that are no chats. routed_experts, routed_experts_start: as in `RequestOutput`.
    """

    prompt_ids: IntArray
    token_ids: IntArray
    logprobs: FloatArray
    spans: list[VersionSpan]
    finish: FinishReason
    temperature: Float32 = 1.0
    logprob_law: LogprobLaw = "model"
    text_bytes: Count = 0
    text_digest: Digest = b""
    key: Digest = b""
    routed_experts: RouteArray | None = None
    routed_experts_start: Count = 0

    @property
    def num_bytes(self) -> int:
        """Of its arrays."""
        routes = 0 if self.routed_experts is None else self.routed_experts.nbytes
        return self.prompt_ids.nbytes + self.token_ids.nbytes + self.logprobs.nbytes + routes


class EndCall(Struct, frozen=True, kw_only=True, tag="end_call"):
    """Record what a call came to; a reply goes out only once this is answered. id: of the reply.
    failed: why it did not get one whole, "" if it did. Raises UnknownRollout, StoreFull."""

    rollout: ClientId
    call: Count
    id: ClientId = ""
    samples: list[CallSample] = msgspec.field(default_factory=list)
    failed: Message = ""
    refused: bool = False
    """It failed before anything was sampled, as a body that is no good does."""


class RewardRollout(Struct, frozen=True, kw_only=True, tag="reward_rollout"):
    """Note a reward, in place of the one before: of a call, or of the whole rollout. Raises
    UnknownRollout, InvalidRequest (`call`)."""

    rollout: ClientId
    reward: Float32
    call: Count | None = None


class GetRollout(Struct, frozen=True, kw_only=True, tag="get_rollout"):
    """Ask for everything that was recorded. Raises UnknownRollout."""

    rollout: ClientId


class CloseRollout(Struct, frozen=True, kw_only=True, tag="close_rollout"):
    """Forget a rollout. Raises UnknownRollout."""

    rollout: ClientId


class CallNode(Struct, frozen=True, kw_only=True):
    """One sequence of a call in the tree of a rollout.

    parent: index of the node whose tokens, prompt and output and those before it, begin this one's
    prompt; -1 for none. prompt_ids: int32, the rest of the prompt. token_ids, logprobs, spans,
    finish, temperature, logprob_law: as in `CallSample`. routed_experts: the routes of its own
    tokens but the last, behind that of the last token of its parent; None where there are none.
    """

    parent: int
    call: Count
    prompt_ids: IntArray
    token_ids: IntArray
    logprobs: FloatArray
    spans: list[VersionSpan]
    finish: FinishReason
    temperature: float
    logprob_law: LogprobLaw
    routed_experts: RouteArray | None = None


class CallRecord(Struct, frozen=True, kw_only=True):
    """One call. open: its reply has not gone out."""

    id: str = ""
    failed: str = ""
    refused: bool = False
    open: bool = False
    reward: float | None = None


class CallPrefix(Struct, frozen=True, kw_only=True):
    """What a prompt goes on from.

    ids: int32, empty for nothing. text_bytes: of the prompt's text that are theirs; -1 where the
    conversation is told by its key. key: number of the key that was found. stopped: the stop token
    that they end with, -1 without.
    """

    ids: IntArray = msgspec.field(default_factory=lambda: np.zeros(0, np.int32))
    text_bytes: int = 0
    key: int = -1
    stopped: int = -1


class RolloutState(Struct, frozen=True, kw_only=True):
    """A rollout, or what a command says of it. complete: every call that was not refused was
    recorded before its reply, and none failed. return_routed_experts: as in `OpenRollout`. nodes,
    calls: of `GetRollout`. call, prefixes: of `BeginCall`."""

    rollout: str
    timeout_s: float
    history: History = "kept"
    return_routed_experts: bool = False
    complete: bool = True
    num_calls: Count = 0
    reward: float | None = None
    nodes: list[CallNode] = msgspec.field(default_factory=list)
    calls: list[CallRecord] = msgspec.field(default_factory=list)
    call: Count = 0
    prefixes: list[CallPrefix] = msgspec.field(default_factory=list)


RolloutCommand = OpenRollout | BeginCall | EndCall | RewardRollout | GetRollout | CloseRollout
