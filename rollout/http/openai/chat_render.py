"""The prompt of a chat request: messages through a template, never longer on the event loop than
a small conversation takes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from engine.errors import InvalidRequest
from rollout.text.messages import Message
from rollout.text.render_process import RenderJob, RenderProcess
from rollout.text.tokenizer import Tokenizer

_INLINE_BYTES = 64 << 10
_MAX_TEMPLATE_CHARS = 256 << 10


class ChatRenderer:
    """Renders conversations of one server.

    A small one by the model's own template is rendered where the call is. A large one, and every
    one whose request brings its template, is rendered by a process with limits of time, memory
    and output: one process for each of the two, so that a template of a request delays no other
    request but those that bring one.

    trusted: whether templates of requests are rendered at all.
    """

    def __init__(self, tokenizer: Tokenizer, *, trusted: bool, limit_s: float = 5.0) -> None:
        self._tokenizer = tokenizer
        self._trusted = trusted
        self._own = _Renderer(limit_s)
        self._requested = _Renderer(limit_s)

    async def render(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        *,
        source: str | None,
        num_bytes: int,
        max_chars: int,
    ) -> str:
        """The conversation as text.

        source: the template that the request brings. num_bytes: of the request's body, which
        bounds messages and variables. max_chars: of the text. Raises InvalidRequest naming
        `messages` or `chat_template`, which is refused where it is not trusted, and
        ContextTooLong for a text too long.
        """
        own = self._tokenizer.template_for(variables.get("tools")) if source is None else None
        if own is not None and num_bytes <= _INLINE_BYTES:
            return own.write(messages, variables, max_chars=max_chars)
        if source is not None:
            self._check_source(source)
        job = RenderJob(
            source=own.source if own is not None else source or "",
            special_tokens=self._tokenizer.special_tokens,
            messages=messages,
            variables=variables,
            max_chars=max_chars,
        )
        renderer = self._requested if source is not None else self._own
        return await renderer.render(job)

    def close(self) -> None:
        """End the processes. Idempotent."""
        self._own.process.close()
        self._requested.process.close()

    def _check_source(self, source: str) -> None:
        if not self._trusted:
            raise InvalidRequest(
                "a chat_template in a request is a program of its sender; start the server with "
                "--trust-request-chat-template, or leave it out and take the model's own",
                field="chat_template",
            )
        if len(source) > _MAX_TEMPLATE_CHARS:
            raise InvalidRequest(
                f"chat_template has {len(source)} characters; the most is {_MAX_TEMPLATE_CHARS}",
                field="chat_template",
            )


class _Renderer:
    """A process, and the thread that waits for it."""

    def __init__(self, limit_s: float) -> None:
        self.process = RenderProcess(limit_s=limit_s)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="chat-template")

    async def render(self, job: RenderJob) -> str:
        """The job's text; a caller that is cancelled ends the job."""
        stop = threading.Event()
        future: Future[str] = self._pool.submit(self.process.render, job, stop)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if not future.cancelled():
                self.process.interrupt(stop)
            raise
