"""Version spans: which weights sampled which tokens, or computed their KV."""

from __future__ import annotations

from collections.abc import Iterable

from engine.protocol import VersionSpan


def join_spans(spans: Iterable[VersionSpan]) -> list[VersionSpan]:
    """The same spans in their order, neighbours of one version joined and empty ones left out."""
    joined: list[VersionSpan] = []
    for span in spans:
        if span.end <= span.start:
            continue
        if joined and joined[-1].version == span.version:
            joined[-1] = VersionSpan(span.version, joined[-1].start, span.end)
        else:
            joined.append(span)
    return joined


def clip_spans(spans: Iterable[VersionSpan], end: int, *, start: int = 0) -> list[VersionSpan]:
    """What the spans say of positions [start, end), joined as by `join_spans`."""
    return join_spans(VersionSpan(s.version, max(s.start, start), min(s.end, end)) for s in spans)
