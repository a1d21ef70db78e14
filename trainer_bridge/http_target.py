"""An engine behind its HTTP server, as a target of updates."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import msgspec

from engine.errors import EngineDead, SlipstreamError, by_name
from engine.protocol import Control, Reply
from engine.protocol.deadlines import deadlines


class HttpTarget:
    """Sends control commands to `POST {url}/command`.

    url: such as "http://127.0.0.1:30000". api_key: the admin key, where the server wants one.
    timeout_s: for one command, in place of what the table of deadlines gives it.
    """

    def __init__(self, url: str, *, api_key: str = "", timeout_s: float | None = None) -> None:
        self._url = url.rstrip("/")
        self._api_key = api_key
        self._timeout_s = timeout_s

    def send(self, command: Control) -> Reply:
        """Run one control command. Raises the typed error of a refusal, and EngineDead when
        the server does not answer."""
        headers = {"Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        request = urllib.request.Request(
            f"{self._url}/command", data=msgspec.json.encode(command), headers=headers
        )
        timeout_s = deadlines(command).http if self._timeout_s is None else self._timeout_s
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return msgspec.json.decode(response.read(), type=Reply)
        except urllib.error.HTTPError as error:
            raise _refusal(error.read(), error.code) from error
        except (urllib.error.URLError, TimeoutError) as error:
            raise EngineDead(f"{self._url} does not answer: {error}", field="url") from error


def _refusal(body: bytes, status: int) -> SlipstreamError:
    """The typed error a server's JSON describes."""
    try:
        error: Any = json.loads(body)["error"]
        return by_name(error["type"], error["message"], error.get("field", ""))
    except (ValueError, KeyError, TypeError):
        text = body[:500].decode(errors="replace")
        return SlipstreamError(f"the server answered {status}: {text}", field="url")
