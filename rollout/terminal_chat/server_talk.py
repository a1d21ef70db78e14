"""Talk to a server: OpenAI's chat, as a stream."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import httpx
import msgspec
from msgspec import Meta, Struct

from engine.errors import EngineDead, InvalidRequest
from engine.protocol.urls import url_fault
from rollout.client import event_data, headers_of, reply_error
from rollout.terminal_chat.chat_config import Settings
from rollout.terminal_chat.talk import Piece, Turn

_CONNECT_S = 10.0
_SILENT_S = 600.0
"""Longest wait for the next bytes of a reply."""

T = TypeVar("T")


class _Model(Struct):
    id: str


class _Models(Struct):
    """What /v1/models says."""

    data: Annotated[list[_Model], Meta(min_length=1)]


class _Delta(Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Token(Struct):
    token: str
    logprob: float


class _Logprobs(Struct):
    content: list[_Token] | None = None


class _Choice(Struct):
    delta: _Delta | None = None
    logprobs: _Logprobs | None = None


class _Usage(Struct):
    completion_tokens: int


class _Chunk(Struct):
    """One chunk of a stream, as far as it is shown."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


class ServerTalk:
    """The server at `url`, whose key is `api_key`. Raises InvalidRequest (`--url`) for what is no
    URL of a server, as the errors of the tree that a server answers with."""

    def __init__(self, url: str, api_key: str) -> None:
        if fault := url_fault(url):
            raise InvalidRequest(fault, field="--url")
        self._url = url.rstrip("/")
        self._headers = headers_of(api_key)
        timeout = httpx.Timeout(_SILENT_S, connect=_CONNECT_S)
        self._http = httpx.Client(base_url=self._url, timeout=timeout)
        self._model = ""

    @property
    def name(self) -> str:
        """See `Talk`: the model that the server names, once it was asked."""
        return f"{self._served()} at {self._url}"

    def reply(self, turns: Sequence[Turn], settings: Settings) -> Generator[Piece, None, None]:
        """See `Talk`."""
        body = msgspec.json.encode(self._body(turns, settings))
        with (
            self._reached(),
            self._http.stream(
                "POST", "/v1/chat/completions", content=body, headers=self._headers
            ) as response,
        ):
            if response.status_code != 200:
                raise reply_error(response.read(), response.status_code)
            num_tokens, ended = 0, False
            for data in event_data(response):
                if ended := data == b"[DONE]":
                    break
                for piece in _pieces(data, num_tokens):
                    num_tokens = piece.num_tokens
                    yield piece
            if not ended:
                raise EngineDead(f"{self._url} ended the reply in the middle", field="server")

    def close(self) -> None:
        """See `Talk`."""
        self._http.close()

    def _body(self, turns: Sequence[Turn], settings: Settings) -> dict[str, Any]:
        found: dict[str, Any] = {
            "model": self._served(),
            "messages": list(turns),
            "max_completion_tokens": settings.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if settings.logprobs:
            found["logprobs"] = True
        if settings.temperature is not None:
            found["temperature"] = settings.temperature
        if settings.seed is not None:
            found["seed"] = settings.seed
        return found

    def _served(self) -> str:
        if not self._model:
            with self._reached():
                response = self._http.get("/v1/models", headers=self._headers)
            if response.status_code != 200:
                raise reply_error(response.content, response.status_code)
            self._model = _decoded(response.content, _Models).data[0].id
        return self._model

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise EngineDead(f"no answer from {self._url}: {reason}", field="server") from error


def _pieces(data: bytes, num_tokens: int) -> Iterator[Piece]:
    """The pieces of one chunk of a stream, behind `num_tokens` tokens. Raises the error that came
    in its place."""
    chunk = _decoded(data, _Chunk)
    if chunk.error is not None:
        raise reply_error(data, 500)
    for choice in chunk.choices or ():
        delta = choice.delta or _Delta()
        entries = (choice.logprobs.content if choice.logprobs else None) or ()
        tokens = tuple((entry.token, entry.logprob) for entry in entries)
        thought = delta.reasoning_content or delta.reasoning or ""
        answer = delta.content or ""
        num_tokens += len(tokens) or bool(thought or answer)
        if thought:
            yield Piece(text=thought, kind="thought", num_tokens=num_tokens)
        if answer or not thought:
            yield Piece(text=answer, tokens=tokens, num_tokens=num_tokens)
    if chunk.usage is not None:
        yield Piece(text="", num_tokens=chunk.usage.completion_tokens)


def _decoded(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        shown = data[:200].decode(errors="replace")
        raise EngineDead(f"what came is no reply of a server: {shown}", field="server") from error
