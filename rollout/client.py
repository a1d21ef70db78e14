"""A typed client of the server, over httpx: generate, stream, and control commands."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import httpx
import msgspec

from engine.errors import EngineDead, InvalidRequest, SlipstreamError, of_body
from engine.protocol import (
    Command,
    GenerateRequest,
    GenerateResponse,
    GetState,
    ReplicaState,
    Reply,
)
from engine.protocol.urls import url_fault
from rollout.scheduler.routes.reply_fields import Ids, decoded_routes

# Made while this module is imported: msgspec looks a type up at its first use, and crashes the
# interpreter where two threads are the first at once.
_REPLY = msgspec.json.Decoder(Reply)
_RESPONSE = msgspec.json.Decoder(GenerateResponse)
_RESPONSES = msgspec.json.Decoder(list[GenerateResponse])
_POLL_S = 0.1
_CONNECT_S = 10.0


class Client:
    """One server at `url`, such as "http://127.0.0.1:30000".

    generate_s: deadline of a generation. control_s: deadline of a control command; weight
    commands end by their own before. Every method raises the typed error the server answers
    with, and EngineDead if the server cannot be reached or misses the deadline. Raises
    InvalidRequest for what is no URL of a server.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str = "",
        admin_api_key: str = "",
        generate_s: float = 3600.0,
        control_s: float = 1800.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        if fault := url_fault(url):
            raise InvalidRequest(fault, field="url")
        self._url = url.rstrip("/")
        self._key = api_key
        self._admin_key = admin_api_key or api_key
        self._generate_s = httpx.Timeout(generate_s, connect=_CONNECT_S)
        self._control_s = httpx.Timeout(control_s, connect=_CONNECT_S)
        try:
            self._http = httpx.Client(base_url=self._url, transport=transport)
        except httpx.InvalidURL as error:
            raise InvalidRequest(f"{url[:200]!r} is no URL: {error}", field="url") from error

    def generate(
        self, requests: GenerateRequest | Sequence[GenerateRequest]
    ) -> list[GenerateResponse]:
        """Replies to a request or a batch, prompt-major; `n` replies a request. The prompts of
        a batch are all text or all ids."""
        if isinstance(requests, GenerateRequest):
            body = msgspec.json.encode(requests)
        else:
            body = _batch_body(list(requests))
        data = self._post("/generate", body, self._key, self._generate_s)
        if data.lstrip().startswith(b"["):
            return _RESPONSES.decode(data)
        return [_RESPONSE.decode(data)]

    def stream(self, request: GenerateRequest) -> Iterator[GenerateResponse]:
        """Replies as the output grows; each holds everything so far unless the server streams
        increments. Closing the iterator aborts the request. Raises the server's typed error, also
        one that comes in the middle of the stream."""
        body = msgspec.json.encode(msgspec.structs.replace(request, stream=True))
        try:
            with self._http.stream(
                "POST",
                "/generate",
                content=body,
                headers=headers_of(self._key),
                timeout=self._generate_s,
            ) as response:
                if response.status_code != 200:
                    raise reply_error(response.read(), response.status_code)
                yield from _replies(event_data(response))
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def send(self, command: Command) -> Reply:
        """Run a control command of the protocol."""
        body = msgspec.json.encode(command)
        data = self._post("/command", body, self._admin_key, self._control_s)
        return _REPLY.decode(data)

    def state(self) -> ReplicaState:
        """What the engine is and does right now."""
        reply = self.send(GetState())
        assert reply.state is not None
        return reply.state

    def call(self, path: str, body: Any = None) -> Any:
        """POST a JSON object to a control route of any dialect; its reply as objects, or as
        text where the route answers text. Without a body, GET."""
        method, data = ("GET", b"") if body is None else ("POST", msgspec.json.encode(body))
        response = self._request(method, path, data, self._admin_key, self._control_s)
        plain = not response.headers.get("content-type", "").startswith("application/json")
        return response.text if plain else msgspec.json.decode(response.content)

    def wait_ready(self, timeout_s: float = 600.0) -> None:
        """Return once the server is healthy. Raises EngineDead if it is not in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self._request("GET", "/health", b"", "", httpx.Timeout(_CONNECT_S))
                return
            except EngineDead:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _post(self, path: str, body: bytes, key: str, timeout: httpx.Timeout) -> bytes:
        return self._request("POST", path, body, key, timeout).content

    def _request(
        self, method: str, path: str, body: bytes, key: str, timeout: httpx.Timeout
    ) -> httpx.Response:
        try:
            response = self._http.request(
                method, path, content=body, headers=headers_of(key), timeout=timeout
            )
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code != 200:
            raise reply_error(response.content, response.status_code)
        return response

    def _unreachable(self, error: httpx.HTTPError) -> EngineDead:
        reason = str(error) or type(error).__name__
        return EngineDead(f"no answer from {self._url}: {reason}", field="server")


def routed_experts(fields: Mapping[str, Any]) -> Ids | None:
    """The routes of a reply's `meta_info`, or of a branch of a rollout that was read: ids of
    experts [tokens - 1 - start, layers, experts of a token] in the dtype that was sent, in which -1
    or the largest unsigned number is an absent one; None without (docs/routed_experts.md)."""
    return decoded_routes(fields)


def headers_of(key: str) -> dict[bytes, bytes]:
    """The headers of a call of a server that has this key; "" for none. Raises InvalidRequest
    (`api_key`) for a key that no header can hold."""
    headers = {b"content-type": b"application/json"}
    if any(char < " " or char == "\x7f" for char in key):
        raise InvalidRequest(
            "api_key: the key has a line break or another control character", field="api_key"
        )
    # Bytes, since httpx takes a str to be ASCII.
    value = b"Bearer " + key.encode(errors="surrogateescape")
    return {**headers, b"authorization": value} if key else headers


def _batch_body(requests: list[GenerateRequest]) -> bytes:
    """The lists of the native dialect: a value an item for every field that is set."""
    if not requests:
        raise InvalidRequest("the batch is empty; send at least one request", field="requests")
    kinds = {request.text is None for request in requests}
    if len(kinds) > 1:
        raise InvalidRequest("a batch is all text or all input_ids", field="text, input_ids")
    unset = GenerateRequest()
    body: dict[str, Any] = {}
    for name in GenerateRequest.__struct_fields__:
        values = [getattr(request, name) for request in requests]
        if any(value != getattr(unset, name) for value in values):
            body[name] = values
    if "stream" in body:
        raise InvalidRequest("a batch does not stream here; use `stream`", field="stream")
    return msgspec.json.encode(body)


def event_data(response: httpx.Response) -> Iterator[bytes]:
    """The data of server-sent events, a line each. httpx's own lines end at every character that
    Unicode takes for an end, such as U+2028, which JSON has within its texts."""
    parts: list[bytes] = []
    for piece in response.iter_bytes():
        first, *rest = piece.split(b"\n")
        parts.append(first)
        for begun in rest:
            line, parts = b"".join(parts), [begun]
            if line.startswith(b"data:") and (data := line.removeprefix(b"data:").strip()):
                yield data


def _replies(events: Iterator[bytes]) -> Iterator[GenerateResponse]:
    for data in events:
        if data == b"[DONE]":
            return
        if data.startswith(b'{"error"'):
            raise reply_error(data, 500)
        yield _RESPONSE.decode(data)


def reply_error(data: bytes, status: int) -> SlipstreamError:
    """What a reply of another status than 200 says, as the error of the tree that the server
    raised."""
    told = f"status {status}: {data[:500].decode(errors='replace')}"
    return of_body(data) or SlipstreamError(told, field="server")
