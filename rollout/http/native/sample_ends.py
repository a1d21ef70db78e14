"""What follows from the end of a sequence: for the engine, and for the call that it is of."""

from __future__ import annotations

from engine.errors import SlipstreamError, by_name
from engine.protocol import Stop
from rollout.http.native.sample import Sample
from rollout.masks.grammar.requested import grammar_field, in_field

_REFUSED = frozenset(
    {
        *("InvalidRequest", "ContextTooLong", "UnsupportedOption", "QueueFull", "NoVersion"),
        *("UnknownSession", "SessionBusy", "StoreFull"),
    }
)
# A call with a sequence that ended by one of these is answered by the error.
_FAILED = _REFUSED | {
    *("NonFiniteLogits", "InternalError", "MaskError", "MaskTimeout", "UnmetConstraint"),
}


def stop_of(sample: Sample) -> Stop:
    """What tells the engine where the text of a sequence stopped."""
    assert sample.stop is not None
    return Stop(
        rid=sample.request.rid,
        num_tokens=sample.stop.num_tokens,
        matched=sample.stop.matched,
        session=sample.request.session,
    )


def failure_of(sample: Sample) -> SlipstreamError | None:
    """The error that a call with this sequence is answered by, if it ended by one."""
    finish = sample.finish
    if finish is None or finish.error not in _FAILED:
        return None
    error = by_name(finish.error or "", finish.message or "", finish.field or "")
    return in_field(error, grammar_field(sample.wire))
