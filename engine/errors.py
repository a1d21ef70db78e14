"""The one exception tree of Slipstream.

::

    SlipstreamError
    ├── InvalidRequest (ValueError)    the caller's mistake; names the field
    │   ├── ContextTooLong             prompt does not fit the context
    │   ├── UnmetConstraint            what it asks of its output cannot be met any further
    │   └── UnsupportedOption          a known wire field this engine does not serve
    ├── QueueFull                      the waiting queue is at its limit; try later
    ├── StoreFull                      sessions or rollouts are at their limit; close some
    ├── UnknownSession                 no such session is open here (any more)
    ├── SessionBusy                    a turn of the session is in progress
    ├── UnknownRollout                 no such rollout is open here (any more)
    ├── ModelError                     a model cannot be loaded
    │   ├── ModelNotFound
    │   ├── UnknownArchitecture
    │   └── CheckpointError            files are there but do not describe the model
    ├── WeightUpdateError              an update failed; the message says what serves now
    │   ├── UpdateOrder                a command of the update came out of order
    │   ├── ManifestMismatch           unknown, missing, duplicate or misshapen tensor
    │   ├── ChecksumMismatch           a tensor's bits are not the sender's
    │   ├── NonFiniteWeights           a tensor has NaN, inf or what its dtype cannot hold
    │   ├── GroupError                 a process group that cannot be joined or broke
    │   ├── UpdateTimeout              a sender or rank missed its deadline
    │   ├── FleetDivided               some engines committed a version, others did not
    │   └── NoVersion                  no version may serve: publish a whole one
    ├── CommandTimeout                 the engine lives but did not answer this one command
    ├── PauseCancelled                 a resume or another pause ended a pause that waited
    ├── ProfileOrder                   a profile is started twice, or stopped without one
    ├── MemoryReleased                 what the command needs was given back; resume it first
    ├── Unauthorized                   no key, or a wrong one
    ├── Forbidden                      a route that this address does not serve
    ├── OutOfMemory                    the memory planner refuses, with numbers
    ├── GradingFailed              more replies than a run allows have no reward
    ├── DiskFull                       a file does not fit; names path and bytes
    ├── InternalError                  a mistake of ours: it ended one request or command
    ├── NonFiniteLogits                a sequence whose logits are NaN or infinite; it ends
    ├── MaskError                      what may be sampled is not known for one sequence; it ends
    │   └── MaskTimeout                it was not known in time
    ├── NonFiniteGradient              a trainer's gradient is not finite, however small the loss
    └── EngineDead                     a rank died or missed its deadline

Callers' mistakes are `InvalidRequest`; our own are plain `assert`. Every error
carries the name of the field, tensor or rank it speaks of, so that a structured
reply can be made from it without parsing the message.
"""

from __future__ import annotations

import json
from typing import Any, Self


class SlipstreamError(Exception):
    """Base of every error the project raises on purpose.

    `field` names what the error is about: a request field, a tensor, a rank. `status` is HTTP's;
    `code` the word for it that clients of OpenAI's API know, where they know one. `retry_after_s`:
    when to ask again, whole seconds; 0 where that is not known.
    """

    status = 500
    code = ""
    retry_after_s = 0

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.field = field

    def __str__(self) -> str:
        return self.message

    def copy(self) -> Self:
        """An error that says the same, to be raised to another caller: a traceback grows with
        every raise of one object."""
        return type(self)(self.message, field=self.field)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.field))


def _rebuild(kind: type[SlipstreamError], message: str, field: str) -> SlipstreamError:
    return kind(message, field=field)


class InvalidRequest(SlipstreamError, ValueError):
    """A request that can never be served as it stands."""

    status = 400


class ContextTooLong(InvalidRequest):
    """The prompt, or prompt plus requested tokens, exceeds the context."""


class UnsupportedOption(InvalidRequest):
    """A field of the wire dialect that this engine knows but does not serve."""


class UnmetConstraint(InvalidRequest):
    """What a request asks of its output cannot be met behind the tokens that came: they are none of
    its grammar, nothing may follow them, or the grammar asks for more there than one request may
    have. It ends with those tokens. Names the request's field."""


class QueueFull(SlipstreamError):
    """The waiting queue is at its limit; nothing was lost, send it again later."""

    status = 503


class StoreFull(SlipstreamError):
    """Sessions or rollouts fill the room that the engine has for them: close those that are over,
    or wait until some expire."""

    status = 429


class UnknownSession(SlipstreamError):
    """The session is not open: it never was, was closed, expired, or went with an engine that was
    started again; the message says which, where that is known."""

    status = 404


class SessionBusy(SlipstreamError):
    """A turn of the session is in progress, and its turns come one after another."""

    status = 409


class UnknownRollout(SlipstreamError):
    """The rollout is not open, as `UnknownSession` says of a session."""

    status = 404


class ModelError(SlipstreamError):
    """A model could not be loaded."""

    status = 400


class ModelNotFound(ModelError):
    """No model at that path."""


class UnknownArchitecture(ModelError):
    """The configuration names an architecture the registry does not have."""


class CheckpointError(ModelError):
    """The files exist but do not describe the model: a bad header, a missing tensor."""


class WeightUpdateError(SlipstreamError):
    """An update failed. The message says which version keeps serving, or that none does."""

    status = 409


class UpdateOrder(WeightUpdateError):
    """A command of an update that does not fit its state: a commit before a begin, say."""


class ManifestMismatch(WeightUpdateError):
    """The tensors received are not the tensors the model has."""

    status = 400


class ChecksumMismatch(WeightUpdateError):
    """A tensor arrived with other bits than its sender announced."""

    status = 400


class NonFiniteWeights(WeightUpdateError):
    """A tensor holds NaN or inf, or values beyond the range of the dtype that is served."""

    status = 400


class GroupError(WeightUpdateError):
    """A process group could not be formed, or a member of it is gone; names the rank."""

    status = 400


class UpdateTimeout(WeightUpdateError):
    """A rank or the sender missed the deadline of an update; names the rank or tensor."""

    status = 408


class FleetDivided(WeightUpdateError):
    """Some engines of one push serve its version and others do not; names both, and the engine
    left behind in `field`. Pushing the same version again reaches those left behind."""


class NoVersion(WeightUpdateError):
    """The engine holds no version that it may serve, and refuses every request until a whole one is
    published: it was started again after an update, and could load only what is older; or an
    update that was written in place failed, and its weights may be a mixture."""

    status = 503


class CommandTimeout(SlipstreamError):
    """The engine lives, but one command missed its deadline; what became of it is not known."""

    status = 504


class PauseCancelled(SlipstreamError):
    """A pause waited for requests to finish, and a resume or another pause came first."""

    status = 409


class MemoryReleased(SlipstreamError):
    """Memory that the command needs is released; the message says what to resume, in order."""

    status = 409


class ProfileOrder(SlipstreamError):
    """A profile was started while one is in progress, or stopped while none is."""

    status = 409


class Unauthorized(SlipstreamError):
    """The request has no API key, or not the right one."""

    status = 401


class Forbidden(SlipstreamError):
    """The route is not served to this caller; the message says which option opens it."""

    status = 403


class OutOfMemory(SlipstreamError):
    """The memory planner refuses; the message holds its arithmetic."""

    status = 507


class DiskFull(SlipstreamError):
    """A file or folder does not fit on its disk; what was there before is whole."""

    status = 507


class GradingFailed(SlipstreamError):
    """More replies than a run allows have no reward; the message names the first reason."""


class InternalError(SlipstreamError):
    """A mistake of ours, caught at a boundary: it ended one request or one command, whose name
    it carries, and the log has its traceback. The engine goes on."""


class NonFiniteLogits(SlipstreamError):
    """The model gave NaN or infinite logits for one sequence, which ends with the tokens sampled
    before. The usual causes: weights that are not finite, a faulty device, or an activation that
    the dtype cannot hold; float16 ends at 65504."""


class MaskError(SlipstreamError):
    """What restricts the tokens of one sequence failed, or allows no token at all: the sequence
    ends with the tokens sampled before. Names the request's field, where one is to blame."""


class MaskTimeout(MaskError):
    """What restricts the tokens of one sequence did not say in time which may come next."""

    status = 504


class NonFiniteGradient(SlipstreamError):
    """The gradient of a trainer that scales its loss is NaN or infinite at the smallest scale."""


class EngineDead(SlipstreamError):
    """A rank died or did not answer within its deadline."""

    status = 503


NO_SAVER = (
    "this engine was built without memory.saver, so its memory cannot be released; start it with "
    "memory.saver on (--enable-memory-saver)"
)
"""What a release is refused with, wherever it is found out."""


def of_command(name: str, error: Exception) -> SlipstreamError:
    """What the caller of a command is told of `error`, which its arguments or a mistake of ours
    raised: an error of the tree as it is; a path, value or number that the system refuses as
    InvalidRequest; else InternalError. `name` is the command's."""
    if isinstance(error, SlipstreamError):
        return error
    kind = InvalidRequest if isinstance(error, _OF_ARGUMENTS) else InternalError
    return kind(f"{name} failed: {type(error).__name__}: {error}", field=name)


_OF_ARGUMENTS = (OSError, ValueError, TypeError, OverflowError)


def by_name(kind: str, message: str, field: str = "") -> SlipstreamError:
    """Rebuild an error that crossed a process boundary as (`kind`, `message`, `field`)."""
    pending = [SlipstreamError]
    while pending:
        cls = pending.pop()
        if cls.__name__ == kind:
            return cls(message, field=field)
        pending.extend(cls.__subclasses__())
    return SlipstreamError(f"{kind}: {message}", field=field)


def of_body(body: bytes) -> SlipstreamError | None:
    """The typed error that the body of a server's reply describes, as its clients raise it:
    `{"error": {"type": ..., "message": ..., "field": ...}}`. None for any other body."""
    try:
        error: Any = json.loads(body)["error"]
        return by_name(str(error["type"]), str(error["message"]), str(error.get("field", "")))
    except (ValueError, KeyError, TypeError):
        return None
