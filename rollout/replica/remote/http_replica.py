"""An engine behind a URL, as a replica of this process: `Replica` over HTTP."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cached_property
from typing import Any, Self

import httpx

from engine.errors import EngineDead, SlipstreamError, UnsupportedOption, WeightUpdateError
from engine.protocol import (
    BeginUpdate,
    Command,
    ReplicaState,
    Reply,
    Request,
    RequestOutput,
    UpdateReport,
)
from rollout.client import Client
from rollout.replica.remote.calls import GenerateCall, generate_calls, outputs_of, refusal
from rollout.requests.outputs import refused
from rollout.router.errors import NoWorker, WorkerLost

_MOST_CALLS = 1024
"""Calls of one replica that wait for their replies at a time, each in a thread."""
_POLL_S = 0.1
_KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]
"""A machine that is lost says nothing: its connections end by this, after a minute."""

_LOST = (EngineDead, WeightUpdateError, NoWorker, WorkerLost)
"""Errors of a call that say nothing of its requests: another server, or a later one, answers."""


class HttpReplica:
    """The server or router at `url`; see `Replica`.

    `step` raises EngineDead once every open call has ended, if one could not be answered: its
    requests have no output then, and may be submitted again. api_key, admin_api_key: of the
    server's routes. Raises InvalidRequest for what is no URL of a server.
    """

    def __init__(self, url: str, *, api_key: str = "", admin_api_key: str = "") -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=_MOST_CALLS)
        self.url = url.rstrip("/")
        self.client = Client(
            url,
            api_key=api_key,
            admin_api_key=admin_api_key,
            transport=httpx.HTTPTransport(limits=limits, socket_options=_KEEPALIVE),
        )
        self._pool = ThreadPoolExecutor(_MOST_CALLS, thread_name_prefix="generate")
        self._open: dict[Future[list[RequestOutput]], GenerateCall] = {}
        self._outputs: list[RequestOutput] = []
        self._lost: EngineDead | None = None

    @cached_property
    def _facts(self) -> ReplicaState:
        """What the engine is: that does not change."""
        return self.state()

    def submit(self, requests: Sequence[Request]) -> None:
        """See `Replica`."""
        good: list[Request] = []
        for request in requests:
            error = refusal(request)
            if error is None:
                good.append(request)
            else:
                self._outputs.append(refused(request, error))
        for call in generate_calls(good, self._facts) if good else ():
            self._open[self._pool.submit(self._ask, call)] = call

    def step(self) -> list[RequestOutput]:
        """See `Replica`; waits a moment for the first output."""
        timeout_s = 0.0 if self._outputs else _POLL_S
        done, _ = wait(self._open, timeout=timeout_s, return_when=FIRST_COMPLETED)
        for future in done:
            self._take(future, self._open.pop(future))
        outputs, self._outputs = self._outputs, []
        if not outputs and not self._open and self._lost is not None:
            lost, self._lost = self._lost, None
            raise lost
        return outputs

    def send(self, command: Command) -> Reply:
        """See `Replica`."""
        return self.client.send(command)

    def state(self) -> ReplicaState:
        """See `Replica`; of a router, that of its first worker."""
        return self.client.state()

    def idle(self) -> bool:
        """See `Replica`."""
        return not self._open and not self._outputs and self._lost is None

    def update_weights_inproc(
        self, begin: BeginUpdate, tensors: Iterable[tuple[str, Any]], *, lasting: bool = False
    ) -> UpdateReport:
        """Refused: nothing of this process's memory is read there."""
        raise UnsupportedOption(
            f"the engine at {self.url} cannot read this process's memory; publish over a group "
            "('nccl') or from a folder ('disk')",
            field="transport",
        )

    def close(self) -> None:
        """See `Replica`; what is open is given up, and the server goes on without its caller."""
        self.client.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, call: GenerateCall) -> list[RequestOutput]:
        """In a thread of its own: make a call, and again if the connection ended before an answer.
        The server may have closed one that nobody used, and what is drawn depends on the call
        alone."""
        try:
            replies = self.client.generate(call.wire)
        except EngineDead as error:
            if isinstance(error.__cause__, httpx.TimeoutException):
                raise
            replies = self.client.generate(call.wire)
        return outputs_of(call, replies)

    def _take(self, future: Future[list[RequestOutput]], call: GenerateCall) -> None:
        try:
            self._outputs += future.result()
        except SlipstreamError as error:
            if isinstance(error, _LOST) or error.status == 503:
                told = f"{self.url}: {error.message}"
                self._lost = self._lost or EngineDead(told, field="engine")
            else:
                self._outputs += [refused(request, error) for request in call.requests]
