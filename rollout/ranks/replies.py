"""What all ranks answered, as one answer."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from engine.errors import by_name
from engine.protocol import ErrorInfo, Reply, UpdateReport


def merge(replies: Sequence[Reply]) -> Reply:
    """One reply of the replies of rank 0, 1, ...: lists side by side, reports added up.

    Raises the error of the first rank that has one; the message says what the others said,
    unless every rank said the same.
    """
    errors = [reply.error for reply in replies]
    found = [(rank, error) for rank, error in enumerate(errors) if error is not None]
    if found:
        _, first = found[0]
        message = first.message if _all_alike(errors) else _by_rank(found, len(replies))
        raise by_name(first.kind, message, first.field)
    weights = [
        replace(report, rank=rank) for rank, reply in enumerate(replies) for report in reply.weights
    ]
    return replace(
        replies[0],
        report=_whole(replies),
        memory=[report for reply in replies for report in reply.memory],
        weights=weights,
        traces=[path for reply in replies for path in reply.traces],
    )


def _whole(replies: Sequence[Reply]) -> UpdateReport | None:
    reports = [reply.report for reply in replies if reply.report is not None]
    if not reports:
        return None
    return replace(
        reports[0],
        num_bytes=sum(report.num_bytes for report in reports),
        seconds=max(report.seconds for report in reports),
    )


def _all_alike(errors: Sequence[ErrorInfo | None]) -> bool:
    first = errors[0]
    return first is not None and all(
        error is not None and error.kind == first.kind and error.field == first.field
        for error in errors
    )


def _by_rank(found: Sequence[tuple[int, ErrorInfo]], num_ranks: int) -> str:
    said = "; ".join(f"rank {rank}: {error.kind}: {error.message}" for rank, error in found)
    rest = num_ranks - len(found)
    return f"{said} (the other {rest} of {num_ranks} ranks succeeded)" if rest else said
