"""A reward model behind a URL as a reward: POST /classify of this project's server, or SGLang's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import httpx

from engine.errors import InvalidRequest
from engine.protocol import IntArray
from recipes.rewards.base import Failed, FailureKind, Grade, Item, as_grade
from recipes.rewards.reward_models.model_chat import ModelChat
from recipes.rewards.services.retry import Retry, refusal, until_deadline
from rollout.offline import Tokenizer

MOST_CALLS = 64
"""Calls of one run that a server has at once; it batches them."""

_SHOWN_CHARS = 200


class RewardServer:
    """A `Reward`: each reply is one call, so that one that cannot be scored fails alone."""

    def __init__(
        self,
        url: str,
        tokenizer: Tokenizer,
        *,
        label: int = 0,
        timeout_s: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """url: of the server, without /classify. tokenizer: that of the model it serves, with the
        chat template. label: which of the scores is the reward. timeout_s: of one call
        with its repetitions, as in `HttpReward`.
        transport: how it is reached, by
        default over the network. Raises InvalidRequest (`reward`) for what is no URL."""
        if not url.startswith(("http://", "https://")):
            raise InvalidRequest(
                f"reward: {url} is no address of a server; give classify:http://HOST:PORT",
                field="reward",
            )
        self._chat = ModelChat(tokenizer)
        self._label = label
        self._timeout_s = timeout_s
        self._slots = asyncio.Semaphore(MOST_CALLS)
        self._http = httpx.AsyncClient(
            base_url=url.removesuffix("/").removesuffix("/classify"),
            timeout=timeout_s,
            transport=transport,
        )

    async def grade(self, items: Sequence[Item]) -> list[Grade]:
        """See `Reward`."""
        chats = [self._chat.ids(item) for item in items]
        # As with `RewardModel`, equal chats have equal rewards.
        asked = {ids.tobytes(): ids for ids in chats if not isinstance(ids, Failed)}
        grades = await asyncio.gather(*map(self._asked, asked.values()))
        known = dict(zip(asked, grades, strict=True))
        return [c if isinstance(c, Failed) else known[c.tobytes()] for c in chats]

    async def close(self) -> None:
        """See `Reward`."""
        await self._http.aclose()

    async def _asked(self, ids: IntArray) -> Grade:
        async with self._slots:
            return await until_deadline(lambda: self._ask(ids), self._timeout_s)

    async def _ask(self, ids: IntArray) -> Grade | Retry:
        try:
            reply = await self._http.post("/classify", json={"input_ids": ids.tolist()})
        except httpx.HTTPError as error:
            kind: FailureKind = "timeout" if isinstance(error, httpx.TimeoutException) else "http"
            return Retry(kind=kind, reason=f"the reward server: {type(error).__name__}: {error}")
        if reply.status_code == 200:
            return self._score(reply)
        name, told = refusal(reply, "the reward server")
        if reply.status_code == 429 or reply.status_code >= 500:
            return Retry(kind="http", reason=told)
        return Failed(kind="too_long" if name == "ContextTooLong" else "http", reason=told)

    def _score(self, reply: httpx.Response) -> Grade:
        try:
            return as_grade(reply.json()["embedding"][self._label])
        except (ValueError, LookupError, TypeError):
            told = reply.text[:_SHOWN_CHARS]
            return Failed(kind="unparsable", reason=f"no score of label {self._label} in {told!r}")
