"""Register a server with a router, and keep it registered, by sglang-router's calls
(`rollout.router.worker_routes`): its router may be named too."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from urllib.parse import quote, urlsplit

import httpx
import msgspec

from engine.errors import InvalidRequest
from engine.protocol.urls import address_towards
from rollout.http.edge.access import is_loopback
from rollout.requests.json_types import decode_json

logger = logging.getLogger(__name__)

_CALL_S = 5.0
_AGAIN_S = 1.0
_LOOK_S = 5.0
_EVERYWHERE = frozenset({"0.0.0.0", "::", ""})


class _Registered(msgspec.Struct):
    worker_id: str = ""


class Registration:
    """Tells the router at `router` of the server at `url`, and again if the router forgets it, as
    one does that was started again. key: Bearer key of the router's registration."""

    def __init__(self, router: str, url: str, *, key: str = "") -> None:
        self.url = url
        self._router = router.rstrip("/")
        self._key = key
        self._name = ""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to register."""
        self._task = asyncio.get_running_loop().create_task(self._keep())

    async def leave(self) -> None:
        """Say that nothing new may come; within a moment, or not at all."""
        if self._task is None:
            return
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._task = None
        if self._name:
            async with self._client() as client:
                with contextlib.suppress(httpx.HTTPError):
                    await client.delete(f"{self._router}/workers/{quote(self._name, safe='')}")

    async def _keep(self) -> None:
        told = False
        async with self._client() as client:
            while True:
                try:
                    await self._register(client)
                    told = False
                except (httpx.HTTPError, InvalidRequest) as error:
                    if not told:
                        logger.warning("%s takes no registration yet: %s", self._router, error)
                        told = True
                    self._name = ""
                await asyncio.sleep(_LOOK_S if self._name else _AGAIN_S)

    async def _register(self, client: httpx.AsyncClient) -> None:
        if self._name:
            known = await client.get(f"{self._router}/workers/{quote(self._name, safe='')}")
            if known.status_code == 200:
                return
        body = {"url": self.url, "worker_type": "regular"}
        reply = await client.post(f"{self._router}/workers", json=body)
        reply.raise_for_status()
        told: _Registered = decode_json(reply.content, _Registered, what="what it answers")
        self._name = told.worker_id or self.url
        logger.info("registered %s with %s", self.url, self._router)

    def _client(self) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {self._key}"} if self._key else {}
        return httpx.AsyncClient(headers=headers, timeout=_CALL_S, trust_env=False)


def own_url(host: str, port: int, router: str) -> str:
    """Where others reach a server bound to `host`: there, or, bound to every address or to a
    loopback one that the router does not share, at the address that this machine reaches the
    router from."""
    there = urlsplit(router).hostname or ""
    if host in _EVERYWHERE or (is_loopback(host) and not is_loopback(there)):
        host = address_towards(router) or host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
