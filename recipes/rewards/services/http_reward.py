"""A reward behind HTTP: `--reward http://host:port/path`.

A POST of {"items": [{"prompt", "messages", "reply", "answer", "columns"}, ...]} is answered by
{"rewards": [number or null, ...]}, one a reply, null for one that the service could not grade.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import httpx

from recipes.rewards.base import Failed, Grade, Item, as_grade
from recipes.rewards.graders.frames import to_json
from recipes.rewards.services.retry import Retry, until_deadline

MAX_ITEMS = 64
"""Replies of one request."""
MAX_REQUESTS = 8
"""Requests at once."""
SHOWN_CHARS = 200


class HttpReward:
    """A `Reward`. timeout_s: of one request with all its repetitions, which follow a connection
    that fails and a status of 429 or 5xx. transport: in place of the network, for tests."""

    def __init__(
        self, url: str, *, timeout_s: float, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._transport = transport
        self._client: httpx.AsyncClient | None = None
        self._free = asyncio.Semaphore(MAX_REQUESTS)

    async def grade(self, items: Sequence[Item]) -> list[Grade]:
        """See `Reward`. A request that fails fails for all its replies."""
        parts = [items[start : start + MAX_ITEMS] for start in range(0, len(items), MAX_ITEMS)]
        grades = await asyncio.gather(*(self._grade_part(part) for part in parts))
        return [grade for part in grades for grade in part]

    async def close(self) -> None:
        """See `Reward`."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def _grade_part(self, items: Sequence[Item]) -> list[Grade]:
        body = to_json({"items": [_wire(item) for item in items]})
        async with self._free:
            found = await until_deadline(lambda: self._ask(body, len(items)), self._timeout_s)
        return [found] * len(items) if isinstance(found, Failed) else found

    async def _ask(self, body: bytes, num: int) -> list[Grade] | Failed | Retry:
        if self._client is None:
            self._client = httpx.AsyncClient(timeout=self._timeout_s, transport=self._transport)
        try:
            reply = await self._client.post(
                self._url, content=body, headers={"content-type": "application/json"}
            )
        except httpx.HTTPError as error:
            return Retry(kind="http", reason=f"{self._url}: {type(error).__name__}: {error}")
        if reply.status_code != 200:
            told = f"{self._url}: status {reply.status_code}: {reply.text[:SHOWN_CHARS]}"
            if reply.status_code == 429 or reply.status_code >= 500:
                return Retry(kind="http", reason=told)
            return Failed(kind="http", reason=told)
        return _read(reply.content, num)


def _wire(item: Item) -> dict[str, Any]:
    return {
        "prompt": item.problem.question,
        "messages": list(item.messages),
        "reply": item.reply,
        "answer": item.problem.answer,
        "columns": item.problem.columns,
    }


def _read(body: bytes, num: int) -> list[Grade] | Failed:
    """The grades of a reply's body, or why it holds none."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        return Failed(kind="unparsable", reason=f"not JSON: {error}")
    rewards = found.get("rewards") if isinstance(found, dict) else None
    if not isinstance(rewards, list):
        return Failed(kind="unparsable", reason='no object with a list "rewards"')
    if len(rewards) != num:
        return Failed(kind="unparsable", reason=f"{len(rewards)} rewards for {num} replies")
    return [_grade(value) for value in rewards]


def _grade(value: object) -> Grade:
    if value is None:
        return Failed(kind="http", reason="the service could not grade it (null)")
    return as_grade(value)
