"""A model that is read and says nothing: `--reward judge:URL --judge-labels yes no`.

It is shown question, answer and reply, and the reward is the probability that its own reply would
begin with the first label, among the labels: one prefill, and no text to be parsed (the normalised
label probabilities of G-Eval, arXiv 2303.16634). Its server has `/tokenize` and `/v1/score` of the
forms that this project's server has.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from string import Template
from typing import Any

import httpx

from engine.errors import InvalidRequest
from recipes.rewards.base import Failed, FailureKind, Grade, Item, as_grade
from recipes.rewards.services.judge import HEAD, MOST_AT_ONCE
from recipes.rewards.services.retry import Retry, refusal, until_deadline

PROMPT = HEAD + "Is the reply right? Say one of these words and nothing else: $labels"

_WHO = "the judge"


class LabelJudge:
    """A `Reward`. url: of the API, such as http://host:port/v1; the key is that of OPENAI_API_KEY.
    model: what the server calls it; None takes what there is. labels: texts of one token each, the
    right one first. timeout_s: of one reply, with its repetitions. transport: how the server is
    reached, by default over the network."""

    def __init__(
        self,
        url: str,
        *,
        model: str | None,
        template: Template,
        labels: Sequence[str],
        timeout_s: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._model = {} if model is None else {"model": model}
        self._template = template
        self._labels = tuple(labels)
        self._label_ids: list[int] | None = None
        self._one_asks = asyncio.Lock()
        self._timeout_s = timeout_s
        self._slots = asyncio.Semaphore(MOST_AT_ONCE)
        self._http = httpx.AsyncClient(
            base_url=url.removesuffix("/").removesuffix("/v1"),
            timeout=timeout_s,
            transport=transport,
            headers={"authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"},
        )

    async def grade(self, items: Sequence[Item]) -> list[Grade]:
        """See `Reward`. Raises InvalidRequest (`judge_labels`) for a label of several tokens."""
        return list(await asyncio.gather(*(self._grade(item) for item in items)))

    async def close(self) -> None:
        """See `Reward`."""
        await self._http.aclose()

    async def _grade(self, item: Item) -> Grade:
        problem = item.problem
        fields = {"question": problem.question, "answer": problem.answer, "reply": item.reply}
        labels = ", ".join(self._labels)
        prompt = self._template.safe_substitute({"labels": labels, **problem.columns, **fields})
        async with self._slots:
            return await until_deadline(lambda: self._ask(prompt), self._timeout_s)

    async def _ask(self, prompt: str) -> Grade | Retry:
        async with self._one_asks:
            ids = await self._ids_of_labels()
        if not isinstance(ids, list):
            return ids
        chat = [{"role": "user", "content": prompt}]
        query = await self._tokens({"messages": chat, "add_generation_prompt": True})
        if not isinstance(query, list):
            return query
        body = {"query": query, "items": [[]], "label_token_ids": ids, "apply_softmax": True}
        found = await self._post("/v1/score", body)
        if isinstance(found, Failed | Retry):
            return found
        try:
            return as_grade(found["scores"][0][0])
        except (LookupError, TypeError):
            return Retry(kind="unparsable", reason=f"{_WHO} gave no score of its labels")

    async def _ids_of_labels(self) -> list[int] | Failed | Retry:
        """The token of each label, asked for once."""
        if self._label_ids is None:
            found = []
            for label in self._labels:
                ids = await self._tokens({"prompt": label, "add_special_tokens": False})
                if not isinstance(ids, list):
                    return ids
                if len(ids) != 1:
                    raise InvalidRequest(
                        f"judge_labels: {label!r} is {len(ids)} tokens to the judge; give texts of "
                        "one token each, such as yes and no",
                        field="judge_labels",
                    )
                found += ids
            self._label_ids = found
        return self._label_ids

    async def _tokens(self, body: dict[str, Any]) -> list[int] | Failed | Retry:
        found = await self._post("/tokenize", body)
        if isinstance(found, Failed | Retry):
            return found
        tokens = found.get("tokens") if isinstance(found, dict) else None
        if isinstance(tokens, list) and all(type(token) is int for token in tokens):
            return tokens
        return Retry(kind="unparsable", reason=f"{_WHO} gave no tokens")

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON of an answer, or a `Failed` or a `Retry`."""
        try:
            reply = await self._http.post(path, json={**body, **self._model})
        except httpx.HTTPError as error:
            kind: FailureKind = "timeout" if isinstance(error, httpx.TimeoutException) else "http"
            return Retry(kind=kind, reason=f"{_WHO}: {type(error).__name__}: {error}")
        if reply.status_code == 200:
            try:
                return reply.json()
            except ValueError:
                return Retry(kind="unparsable", reason=f"{_WHO} answered with no JSON")
        name, told = refusal(reply, _WHO)
        if reply.status_code == 429 or reply.status_code >= 500:
            return Retry(kind="http", reason=told)
        return Failed(kind="too_long" if name == "ContextTooLong" else "http", reason=told)
