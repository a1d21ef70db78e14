"""Programs on a server: native `/generate` over HTTP, a connection for each request under way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cached_property
from pathlib import Path

import httpx
import msgspec

from engine.errors import EngineDead, InvalidRequest
from engine.protocol import GenerateRequest, GenerateResponse
from engine.protocol.urls import url_fault
from rollout.client import Client, headers_of, reply_error
from rollout.text.tokenizer import Tokenizer, load_tokenizer

_RESPONSE = msgspec.json.Decoder(GenerateResponse)
_CONNECT_S = 10.0


class ServerBackend:
    """A `Backend` over the server, or router, at `url`.

    tokenizer: of the model it serves; by default read from the folder that the server says it
    loaded, which has to be on this machine. generate_s: deadline of a request. most_open:
    connections at once. Raises InvalidRequest (`url`) for what is no URL of a server.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str = "",
        tokenizer: Tokenizer | None = None,
        generate_s: float = 3600.0,
        most_open: int = 1024,
    ) -> None:
        if fault := url_fault(url):
            raise InvalidRequest(fault, field="url")
        self.url = url.rstrip("/")
        self._key = api_key
        self._given = tokenizer
        self._timeout = httpx.Timeout(generate_s, connect=_CONNECT_S, pool=None)
        self._limits = httpx.Limits(max_connections=most_open, max_keepalive_connections=most_open)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """See `Backend`. Raises InvalidRequest (`tokenizer`) if the server's model is not on this
        machine, EngineDead if the server is not there."""
        if self._given is not None:
            return self._given
        with Client(self.url, api_key=self._key) as client:
            told = client.call("/model_info")
        model = str(told.get("tokenizer_path", "")) if isinstance(told, dict) else ""
        if not model:
            raise EngineDead(f"{self.url} is no server of a model", field="server")
        if not Path(model).exists():
            raise InvalidRequest(
                f"the server at {self.url} loaded {model}, which is not on this machine; pass "
                "tokenizer=load_tokenizer(FOLDER)",
                field="tokenizer",
            )
        return load_tokenizer(model)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[ServerSession]:
        """See `Backend`."""
        http = httpx.AsyncClient(base_url=self.url, timeout=self._timeout, limits=self._limits)
        async with http:
            yield ServerSession(http, self._key)


class ServerSession:
    """A `Session`. A call that is cancelled closes its connection, by which the server aborts the
    request."""

    def __init__(self, http: httpx.AsyncClient, key: str) -> None:
        self._http = http
        self._headers = headers_of(key)

    async def generate(self, wire: GenerateRequest) -> GenerateResponse:
        """See `Session`. A call whose connection ended before an answer is made once more: what is
        drawn depends on the call alone."""
        body = msgspec.json.encode(wire)
        try:
            response = await self._post(body)
        except httpx.TimeoutException as error:
            raise self._lost(error) from error
        except httpx.TransportError:
            try:
                response = await self._post(body)
            except httpx.TransportError as error:
                raise self._lost(error) from error
        if response.status_code != 200:
            raise reply_error(response.content, response.status_code)
        try:
            found = _RESPONSE.decode(response.content)
        except msgspec.DecodeError as error:
            raise self._no_reply(response.content) from error
        if not isinstance(found.meta_info.get("finish_reason"), dict):
            raise self._no_reply(response.content)
        return found

    def _no_reply(self, body: bytes) -> EngineDead:
        shown = body[:200].decode(errors="replace")
        told = f"what came from {self._http.base_url} is no reply to /generate: {shown}"
        return EngineDead(told, field="server")

    async def _post(self, body: bytes) -> httpx.Response:
        return await self._http.post("/generate", content=body, headers=self._headers)

    def _lost(self, error: httpx.TransportError) -> EngineDead:
        reason = str(error) or type(error).__name__
        return EngineDead(f"no answer from {self._http.base_url}: {reason}", field="server")
