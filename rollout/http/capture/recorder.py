"""One captured call: a prompt that goes on from what was recorded, and the record of its reply."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, ParamSpec, TypeVar

from fastapi import Response
from msgspec.structs import replace

from engine.errors import EngineDead, InvalidRequest, SlipstreamError
from engine.protocol import (
    BeginCall,
    CallPrefix,
    CallSample,
    EndCall,
    GenerateRequest,
    PromptQuery,
)
from rollout.http.capture.conversation import Conversation
from rollout.http.capture.next_prompt import NextPrompts
from rollout.http.edge.sse import EventStream
from rollout.http.native.generate_call import GenerateCall
from rollout.http.native.sample import Sample
from rollout.http.openai.bodies import ChatBody
from rollout.http.services import Services
from rollout.parsers.events import Reply
from rollout.requests.sample_ids import of_call

P = ParamSpec("P")
T = TypeVar("T")

_INLINE = 8192
"""Tokens or characters that are looked at on the event loop."""


class CallRecorder:
    """Sees one call through (`rollout.http.native.generator.Recorder`).

    from_text: the prompts that come as ids were made from text by the server.
    """

    def __init__(
        self,
        services: Services,
        prompts: NextPrompts | None,
        rollout: str,
        *,
        from_text: bool,
    ) -> None:
        self._engine = services.engine
        self._generator = services.generator
        self._chats = services.prompts
        self._prompts = prompts
        self._rollout = rollout
        self._conversation: Conversation | None = None
        self._reply: Callable[[int], Reply] | None = None
        self._from_text = from_text
        self._call = -1
        self._samples: Sequence[Sample] = ()
        self._done = False

    def conversing(self, body: ChatBody) -> None:
        """The call is a chat, or what another dialect's was translated into."""
        assert self._chats is not None, "a chat has been rendered"
        self._conversation = Conversation(
            messages=body.messages,
            variables=self._chats.variables(body),
            own_template=body.chat_template is None,
        )

    def replying(self, reply: Callable[[int], Reply]) -> None:
        """What each sample of the chat says, as far as it was read."""
        self._reply = reply

    async def began(self, call: GenerateCall) -> GenerateCall:
        """Note the call, and let its prompts go on from the branches that they repeat."""
        texts = [await self._text(item) for item in call.items]
        keys: list[bytes] = []
        if self._conversation is not None:
            size = self._conversation.num_chars
            keys = await self._aside(size, self._conversation.keys)
        queries = [PromptQuery(text=text, keys=keys if text else []) for text in texts]
        reply = await self._engine.send(BeginCall(rollout=self._rollout, prompts=queries))
        assert reply.rollout is not None
        self._call = reply.rollout.call
        items = [
            await self._continued(item, text, prefix)
            for item, text, prefix in zip(call.items, texts, reply.rollout.prefixes, strict=True)
        ]
        if reply.rollout.return_routed_experts:
            items = [
                _with_routes(*pair) for pair in zip(items, reply.rollout.prefixes, strict=True)
            ]
        return replace(call, items=items)

    def sampling(self, samples: Sequence[Sample]) -> None:
        """Keep the sequences, which have their outputs when they have finished."""
        self._samples = samples

    async def run(self, work: Coroutine[Any, Any, Response]) -> Response:
        """The reply of a route, once it is recorded; that of a stream records itself before its
        last frames."""
        try:
            response = await work
            if not isinstance(response, EventStream):
                await self._record()
                return response
        except SlipstreamError as error:
            self._fail(error.message, refused=not self._begun)
            raise
        except asyncio.CancelledError:
            self._fail("the client left")
            raise
        return EventStream(self._frames(response.source), response.form)

    async def _frames(self, source: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        why, refused = "the client left", False
        try:
            async with aclosing(source) as frames:
                async for frame in frames:
                    if self._finished and not self._done:
                        await self._record()
                    yield frame
            why = "the reply ended early"
        except SlipstreamError as error:
            why, refused = error.message, not self._begun
            raise
        finally:
            self._fail(why, refused=refused)

    @property
    def _begun(self) -> bool:
        return any(sample.first_at for sample in self._samples)

    @property
    def _finished(self) -> bool:
        return bool(self._samples) and all(s.finish is not None for s in self._samples)

    async def _text(self, item: GenerateRequest) -> str:
        """What a prompt says, if the server may write it as other tokens."""
        if self._prompts is None:
            return ""
        if item.text is not None:
            return await self._aside(len(item.text), self._prompts.text_of_text, item.text)
        ids = item.input_ids or []
        return await self._aside(len(ids), self._prompts.text_of, ids) if self._from_text else ""

    async def _continued(
        self, item: GenerateRequest, text: str, prefix: CallPrefix
    ) -> GenerateRequest:
        if self._prompts is None or not len(prefix.ids):
            return item
        if prefix.text_bytes >= 0:
            ids = await self._aside(len(text), self._prompts.by_text, prefix, text)
        else:
            assert self._conversation is not None
            size = self._conversation.num_chars
            ids = await self._aside(size, self._prompts.by_key, prefix, self._conversation)
        return item if ids is None else replace(item, text=None, input_ids=ids)

    async def _aside(self, size: int, work: Callable[P, T], *args: P.args, **kw: P.kwargs) -> T:
        """What `work` on so many tokens or characters returns; many go beside the event loop."""
        if size <= _INLINE:
            return work(*args, **kw)
        return await self._generator.workers.run(work, *args, **kw)

    async def _record(self) -> None:
        """Have the engine keep what came, before the reply goes out. Raises its refusal."""
        failed = [s for s in self._samples if s.finish is None or s.finish.type == "abort"]
        why = (failed[0].finish.message or "aborted") if failed and failed[0].finish else ""
        sizes = (len(s.request.prompt_ids) + len(s.output.token_ids) for s in self._samples)
        samples = await self._aside(sum(sizes), self._recorded)
        self._done = True
        await self._engine.send(self._end(samples=samples, failed=why))

    def _fail(self, why: str, *, refused: bool = False) -> None:
        """Note that nobody got the reply, unless it was recorded; its client is not waited for."""
        if self._done or self._call < 0:
            return
        self._done = True
        with contextlib.suppress(EngineDead):
            self._engine.post([self._end(failed=why[:4096] or "failed", refused=refused)])

    def _end(
        self, *, samples: list[CallSample] | None = None, failed: str, refused: bool = False
    ) -> EndCall:
        return EndCall(
            rollout=self._rollout,
            call=self._call,
            id=of_call(self._samples[0].request.rid) if self._samples else "",
            samples=samples or [],
            failed=failed,
            refused=refused,
        )

    def _recorded(self) -> list[CallSample]:
        return [self._sample(sample, index) for index, sample in enumerate(self._samples)]

    def _sample(self, sample: Sample, index: int) -> CallSample:
        output, request = sample.output, sample.request
        assert output.finish is not None
        text = b""
        if self._prompts is not None:
            ids = [*request.prompt_ids.tolist(), *output.token_ids.tolist()]
            text = self._prompts.text_of(ids).encode()
        return CallSample(
            prompt_ids=request.prompt_ids,
            token_ids=output.token_ids,
            logprobs=output.logprobs,
            spans=output.spans,
            finish=output.finish,
            temperature=request.sampling.temperature,
            logprob_law=request.logprob_law,
            text_bytes=len(text),
            text_digest=hashlib.sha256(text).digest() if text else b"",
            key=self._key(index),
            routed_experts=output.routed_experts,
            routed_experts_start=output.routed_experts_start,
        )

    def _key(self, index: int) -> bytes:
        if self._conversation is None or self._reply is None:
            return b""
        try:
            return self._conversation.key_with(self._reply(index))
        except InvalidRequest:
            # Such as a call whose arguments are no JSON: nobody can repeat it either.
            return b""


def _with_routes(item: GenerateRequest, prefix: CallPrefix) -> GenerateRequest:
    """The item with its routes wanted: all that its client wants, and those that the branch it goes
    on from does not have."""
    known, ids = prefix.ids.tolist(), item.input_ids
    # A prompt that could not be written behind the branch begins another.
    behind = ids is not None and len(known) > 0 and ids[: len(known)] == known
    start = len(known) - 1 if behind else 0
    if item.return_routed_experts:
        start = min(start, item.routed_experts_start_len)
    return replace(item, return_routed_experts=True, routed_experts_start_len=start)
