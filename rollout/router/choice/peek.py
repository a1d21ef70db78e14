"""What a router reads of a body, which it passes on as it is."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from msgspec import Raw, Struct

from rollout.router.choice.ask import Ask
from rollout.router.wire.messages import ClientRequest

ROUTING_KEY = b"x-smg-routing-key"
"""sglang-router's header of a session that is to stay where it is."""
_MOST_SAMPLES = 1 << 16


class _Sampling(Struct):
    n: int | None = None


class _Body(Struct):
    """Fields of all dialects; those that hold a prompt stay the bytes they are."""

    input_ids: Raw = Raw(b"")
    text: Raw = Raw(b"")
    prompt: Raw = Raw(b"")
    messages: Raw = Raw(b"")
    input: Raw = Raw(b"")
    token_ids: Raw = Raw(b"")
    session: str | None = None
    previous_response_id: str | None = None
    n: int | None = None
    sampling_params: _Sampling | None = None


_DECODER = msgspec.json.Decoder(_Body)


@dataclass(frozen=True, slots=True)
class Seen:
    """ask: for the policy. state: name of what the request goes on with, which one worker has."""

    ask: Ask
    state: str = ""


def peek(request: ClientRequest) -> Seen:
    """What the body says. One that cannot be read says nothing here: a worker refuses it, by the
    name of the field."""
    key = request.header(ROUTING_KEY)
    try:
        body = _DECODER.decode(request.body)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return Seen(Ask(key=key))
    prompt = (
        body.input_ids or body.messages or body.prompt or body.text or body.token_ids or body.input
    )
    count = body.n or (body.sampling_params.n if body.sampling_params is not None else 1) or 1
    ask = Ask(prompt=bytes(prompt), key=key, num_samples=max(1, min(count, _MOST_SAMPLES)))
    return Seen(ask, body.session or body.previous_response_id or "")
