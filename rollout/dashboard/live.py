"""The live stream: what is new behind a reader's cursors, about once a second.

A reader that was away asks with the cursors it had and gets what it missed; one whose cursors are
of another epoch begins anew. The stream sends something every `_BEAT_S`, so that a reader can tell
a quiet source from a dead connection.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Annotated

from msgspec import Meta, Struct, structs

from rollout.dashboard.figures import Live, Snapshot
from rollout.dashboard.source import Source

PERIOD_S = 1.0
"""Between two looks at the source."""
_BEAT_S = 5.0

Cursor = Annotated[int, Meta(ge=0, le=2**53)]


class LiveQuery(Struct, frozen=True, kw_only=True):
    """The epoch that a reader knows, and its cursors; without, it begins anew."""

    epoch: Annotated[str, Meta(max_length=200)] = ""
    series: Cursor = 0
    events: Cursor = 0


async def look(source: Source, query: LiveQuery) -> Live:
    """One message: the present, and a page of rows and of events."""
    epoch = source.epoch
    same = query.epoch == epoch
    return Live(
        epoch=epoch,
        snapshot=await source.snapshot(),
        series=await source.series(query.series if same else 0),
        events=await source.events(query.events if same else 0),
    )


def behind(message: Live) -> LiveQuery:
    """What a reader of the message asks for next."""
    return LiveQuery(epoch=message.epoch, series=message.series.next, events=message.events.next)


async def live(
    source: Source, query: LiveQuery, *, period_s: float = PERIOD_S
) -> AsyncGenerator[Live, None]:
    """Messages for as long as somebody reads them. Rows that are there already come at once, page
    by page; after that a message is sent when it says something new."""
    last: Snapshot | None = None
    sent_at = 0.0
    while True:
        message = await look(source, query)
        query = behind(message)
        told = structs.replace(message.snapshot, at=0.0)
        new = message.series.x or message.events.events or told != last
        if new or time.monotonic() - sent_at >= _BEAT_S:
            yield message
            last, sent_at = told, time.monotonic()
        if not (message.series.more or message.events.more):
            await asyncio.sleep(period_s)
