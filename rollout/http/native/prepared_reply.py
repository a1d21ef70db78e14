"""A long reply that is not streamed, written while its tokens are sampled.

The sequences of a group often end at the same step. A megabyte of their numbers written then would
hold up the reply by as much time as it takes; while they run, nobody waits for it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from rollout.http.native.sample import Sample, SampleDelta
from rollout.requests.respond import to_wire

PIECE = 64
"""Tokens that are written at once: few enough that the last of hundreds of sequences cost little,
and so many that what a piece costs beside its tokens does not count."""


class PreparedReply:
    """Of one sample, whose `Sample.come_in_pieces` said that it may be prepared."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample
        self._ids: list[bytes] = []
        self._entries: list[bytes] = []
        self._count = 0

    def add(self, delta: SampleDelta) -> None:
        """Write what an output added."""
        output = delta.output
        if not len(output.token_ids):
            return
        self._count += len(output.token_ids)
        self._ids.append(_items(output.token_ids.tolist()))
        if self._sample.wire.return_logprob:
            self._entries.append(_items(self._sample.entries(output)))

    def object(self) -> dict[str, Any]:
        """The reply, once the sequence has finished, as an object to encode."""
        sample, count = self._sample, self._count
        assert count == len(sample.output.token_ids), f"{count} tokens were written"
        found = to_wire(sample.response_behind(count))
        found["output_ids"] = _joined(self._ids)
        if sample.wire.return_logprob:
            found["meta_info"]["output_token_logprobs"] = _joined(self._entries)
            found["meta_info"]["output_token_logprobs_length"] = count
        return found


def _items(values: list[Any]) -> bytes:
    """The items of a list as they stand between its brackets."""
    return msgspec.json.encode(values)[1:-1]


def _joined(pieces: list[bytes]) -> msgspec.Raw:
    return msgspec.Raw(b"[" + b",".join(pieces) + b"]")
