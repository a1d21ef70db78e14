"""Frames of a stream in increments: most differ from the one before in a few numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from rollout.http.edge.sse import frame
from rollout.http.native.sample import Sample, SampleDelta
from rollout.http.updates.version_labels import VersionLabels
from rollout.requests.respond import to_wire

Gap = Callable[[Sample, SampleDelta], bytes]
_json = msgspec.json.encode
_MARK = b"\x00"
"""In no JSON text, which escapes it."""


class IncrementWriter:
    """The frames of one sample's stream.

    A frame that brings tokens of one version, their logprobs and their text, and nothing else that
    is new, is written into the gaps of one that was made in full. Any other is made in full.
    """

    def __init__(self, sample: Sample, labels: VersionLabels) -> None:
        self._sample = sample
        self._labels = labels
        self._fixed: tuple[Any, ...] = ()
        self._form = b""
        self._gaps: list[Gap] = []
        self._any = False

    def frame(self, delta: SampleDelta) -> bytes:
        """The event that `delta` is."""
        if not self._any or not _brings_tokens_alone(delta):
            # The first may have more than its output says, such as scores of the prompt.
            self._any = True
            return frame(self._object(delta))
        output = delta.output
        fixed = (
            output.prompt_tokens,
            output.cached_tokens,
            output.num_retractions,
            output.num_restarts,
            self._labels.text(output.spans[0].version),
        )
        if fixed != self._fixed:
            self._fixed = fixed
            self._take_form(self._object(delta))
        return self._form % tuple([gap(self._sample, delta) for gap in self._gaps])

    def _object(self, delta: SampleDelta) -> dict[str, Any]:
        found = to_wire(self._sample.increment(delta))
        self._labels.relabel(found["meta_info"])
        return found

    def _take_form(self, made: dict[str, Any]) -> None:
        """Take what `made` says beside the gaps as what the next frames say."""
        meta = made["meta_info"]
        (span,) = meta["weight_versions"]
        places: list[tuple[dict[str, Any], str, Gap]] = [
            (made, "output_ids", lambda s, d: _json(d.output.token_ids.tolist())),
            (made, "text", lambda s, d: _json(d.text)),
            (meta, "completion_tokens", lambda s, d: b"%d" % s.num_sent),
            (span, "start", lambda s, d: b"%d" % d.output.spans[0].start),
            (span, "end", lambda s, d: b"%d" % d.output.spans[0].end),
            (meta, "output_token_logprobs", lambda s, d: _json(s.entries(d.output))),
            (meta, "output_token_logprobs_length", lambda s, d: b"%d" % len(d.output.token_ids)),
        ]
        for number, (holder, name, _) in enumerate(places, 1):
            if holder.get(name) is not None:
                holder[name] = msgspec.Raw(_MARK + bytes([number]))
        head, *pieces = frame(made).replace(b"%", b"%%").split(_MARK)
        self._gaps = [places[piece[0] - 1][2] for piece in pieces]
        self._form = head + b"".join(b"%b" + piece[1:] for piece in pieces)


def _brings_tokens_alone(delta: SampleDelta) -> bool:
    output = delta.output
    return (
        not delta.finished
        and len(output.spans) == 1
        and output.top is None
        and output.entropies is None
        and output.prompt_logprobs is None
        and output.spec is None
    )
