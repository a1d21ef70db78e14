"""An engine behind its HTTP server, as a target of updates."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request

import msgspec

from engine.errors import EngineDead, InvalidRequest, SlipstreamError, of_body
from engine.protocol import Command, Reply
from engine.protocol.deadlines import deadlines
from engine.protocol.urls import url_fault

# Made while this module is imported: msgspec looks a type up at its first use, and crashes the
# interpreter where two threads are the first at once.
_REPLY = msgspec.json.Decoder(Reply)


class HttpTarget:
    """Sends control commands to `POST {url}/command`, each once and on a connection of its own.

    url: such as "http://127.0.0.1:30000". api_key: the admin key, where the server wants one.
    timeout_s: for one command, in place of what the table of deadlines gives it. Raises
    InvalidRequest for what is no URL of a server.
    """

    def __init__(self, url: str, *, api_key: str = "", timeout_s: float | None = None) -> None:
        if fault := url_fault(url):
            raise InvalidRequest(fault, field="url")
        self.url = url.rstrip("/")
        self._api_key = api_key
        self._timeout_s = timeout_s

    def send(self, command: Command) -> Reply:
        """Run one control command. Raises the typed error of a refusal, and EngineDead when no
        answer comes: whether the command took effect is then unknown."""
        headers = {"Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        request = urllib.request.Request(
            f"{self.url}/command", data=msgspec.json.encode(command), headers=headers
        )
        timeout_s = deadlines(command).http if self._timeout_s is None else self._timeout_s
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                body = response.read()
        except urllib.error.HTTPError as error:
            raise _refusal(_rest(error), error.code) from error
        except (OSError, http.client.HTTPException) as error:
            why = str(error) or type(error).__name__
            raise EngineDead(f"{self.url} does not answer: {why}", field="url") from error
        try:
            return _REPLY.decode(body)
        except msgspec.DecodeError as error:
            raise SlipstreamError(
                f"{self.url} is no server of ours: it answered {_text(body)}", field="url"
            ) from error


def _rest(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read()
    except (OSError, http.client.HTTPException):
        return b""


def _refusal(body: bytes, status: int) -> SlipstreamError:
    told = f"the server answered {status}: {_text(body)}"
    return of_body(body) or SlipstreamError(told, field="url")


def _text(body: bytes) -> str:
    return body[:500].decode(errors="replace")
