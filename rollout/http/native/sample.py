"""One sequence of an HTTP call, from its outputs to its reply."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from engine.protocol import (
    FinishReason,
    GenerateRequest,
    GenerateResponse,
    IntArray,
    Request,
    RequestOutput,
    SamplingParams,
)
from rollout.requests.outputs import Gathered, head, without_routes
from rollout.requests.respond import (
    LogprobEntry,
    RunningReply,
    Seam,
    respond,
    seam,
    text_of,
    token_entries,
)
from rollout.scheduler.continued import num_given
from rollout.text.detokenizer import Detokenizer, StopMatch, TextDelta
from rollout.text.tokenizer import Tokenizer

_RUNNING = FinishReason(type="length")
_ROUTES_A_TOKEN = 64
"""Ids of routes that cost a reply as much as one token."""
_AT_THE_END = ("finish_reason", "weight_versions", "kv_versions", "num_retractions")


class SampleDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What one output added. output: its tokens, cut at a stop string; text: what became
    certain with them; finished: nothing more comes."""

    output: RequestOutput
    text: str
    finished: bool


class _TextTap(Detokenizer):
    """A detokenizer that keeps what it returns, beside giving it to whoever looks for stops."""

    def __init__(
        self, tokenizer: Tokenizer, sampling: SamplingParams, prompt_ids: IntArray
    ) -> None:
        super().__init__(tokenizer, sampling, prompt_ids)
        self.text = ""

    def feed(self, token_ids: Sequence[int]) -> TextDelta:
        return self._kept(super().feed(token_ids))

    def finish(self) -> TextDelta:
        return self._kept(super().finish())

    def _kept(self, delta: TextDelta) -> TextDelta:
        self.text += delta.text
        return delta


class Sample:
    """Takes the outputs of one request; gives deltas, and the reply at the end. `request` is what
    the engine gets; `stop` is the stop string that was found.

    stream: text is wanted as it grows. tokenizer: None for a model without text.
    """

    def __init__(
        self,
        wire: GenerateRequest,
        request: Request,
        tokenizer: Tokenizer | None,
        *,
        index: int | None = None,
        stream: bool = False,
    ) -> None:
        sampling = request.sampling
        wants_text = tokenizer is not None and (stream or bool(sampling.stop))
        self.wire = wire
        self.index = index
        self.started_at = time.monotonic()
        self.first_at = 0.0
        self.finish: FinishReason | None = None
        self._tokenizer = tokenizer
        self._tap = None
        if wants_text and tokenizer is not None:
            self._tap = _TextTap(tokenizer, sampling, request.prompt_ids)
        self._gathered = Gathered(request, self._tap)
        self.request = self._gathered.request
        self._begin = self._begun()
        self._running: RunningReply | None = None
        self._final: RequestOutput | None = None
        self.num_sent = 0
        """Output tokens that deltas have brought."""
        self.stop: StopMatch | None = self._gathered.stop

    def _begun(self) -> Seam | None:
        """Where a continued request goes on; its text begins there."""
        if self.request.output_ids is None:
            return None
        if self._tap is not None:
            self._tap.text = ""
        return seam(self.request, self._tokenizer)

    def come_in_pieces(self, num_tokens: int) -> bool:
        """Before it is sent: have the engine return so many tokens at a time, if the reply is long
        and tokens and their logprobs are all that is in it of each; whether it will. A request that
        may have to start again must not return any."""
        request = self.request
        if request.sampling.max_new_tokens <= 2 * num_tokens:
            return False
        refused = (
            request.stream,
            request.output_ids is not None,
            request.session,
            request.kv_policy == "fresh",
            request.task != "generate",
            request.num_alternatives,
            request.entropy,
            request.prompt_logprob_start >= 0,
            request.return_routed_experts,
        )
        if any(refused):
            return False
        self.request = msgspec.structs.replace(request, stream=True, stream_every=num_tokens)
        return True

    def keep_replies(self) -> None:
        """Before the first output: `partial` will be asked for."""
        self._running = RunningReply(
            self.wire, self.request, self._tokenizer, self.index, self._begin
        )

    def take(self, output: RequestOutput) -> SampleDelta:
        """Take the next output. `stop` is set once a stop string has been seen."""
        if not self.first_at and len(output.token_ids):
            self.first_at = time.monotonic()
        known = 0 if self._tap is None else len(self._tap.text)
        self._gathered.add(output)
        self.stop = self._gathered.stop
        if output.finish is not None:
            self._final = self._gathered.result()
            self.finish, self.stop = self._final.finish, self._gathered.stop
        text = "" if self._tap is None else self._tap.text[known:]
        return SampleDelta(output=self._new(output), text=text, finished=output.finish is not None)

    def response(self) -> GenerateResponse:
        """The reply, once the sequence has finished."""
        return self._respond(self.output)

    def _respond(self, output: RequestOutput) -> GenerateResponse:
        return respond(
            self.wire,
            self.request,
            output,
            self._tokenizer,
            index=self.index,
            begin=self._begin,
        )

    @property
    def text(self) -> str:
        """The text of the reply, once the sequence has finished; "" without a tokenizer."""
        if self._tokenizer is None:
            return ""
        return text_of(self.request, self.output, self._tokenizer, self._begin)

    def response_behind(self, count: int) -> GenerateResponse:
        """`response` without what it has of each of the first `count` tokens. One that comes in
        pieces."""
        whole, text = self.output, None
        if self._tokenizer is not None:
            text = text_of(self.request, whole, self._tokenizer, self._begin)
        rest = msgspec.structs.replace(
            whole,
            start=whole.start + count,
            token_ids=whole.token_ids[count:],
            logprobs=whole.logprobs[count:],
        )
        return respond(self.wire, self.request, rest, self._tokenizer, index=self.index, text=text)

    def partial(self) -> GenerateResponse:
        """The reply with everything so far; `finish_reason` is null while the sequence runs."""
        if self._final is not None:
            return self.response()
        assert self._running is not None, "partial replies are kept where `keep_replies` says so"
        return self._running.response(None if self._tap is None else self._text(self._tap.text))

    def increment(self, delta: SampleDelta) -> GenerateResponse:
        """The reply with what `delta` added; counts of tokens are of everything so far."""
        output = delta.output
        reply = respond(
            self.wire,
            self.request,
            msgspec.structs.replace(output, finish=output.finish or _RUNNING),
            self._tokenizer,
            index=self.index,
            begin=self._begin,
            # What the tap holds back may yet become part of a stop string.
            text=delta.text,
        )
        more = {"finish_reason": None, "completion_tokens": self.num_sent}
        meta = {**reply.meta_info, **more}
        if self._final is not None:
            whole = self._respond(without_routes(self._final)).meta_info
            meta |= {key: whole[key] for key in _AT_THE_END if key in whole}
        return msgspec.structs.replace(reply, meta_info=meta)

    def entries(self, output: RequestOutput) -> list[LogprobEntry]:
        """What a reply says of the logprob of each token of `output`."""
        return token_entries(self.wire, output, self._tokenizer)

    @property
    def output(self) -> RequestOutput:
        """The whole output, once the sequence has finished."""
        assert self._final is not None, f"request {self.request.rid} has not finished"
        return self._final

    @property
    def num_scores(self) -> int:
        """Tokens and scores that the reply writes out, and tokens that its text goes on from: what
        it costs to make."""
        output = self.output
        wanted = self.request.num_alternatives + 1
        scored = 0 if output.prompt_logprobs is None else len(output.prompt_logprobs)
        num_ids = 0 if output.routed_experts is None else output.routed_experts.size
        tokens = (len(output.token_ids) + scored) * wanted + num_given(self.request)
        return tokens + num_ids // _ROUTES_A_TOKEN

    def _text(self, text: str) -> str | None:
        return None if self._tokenizer is None else text

    def _new(self, output: RequestOutput) -> RequestOutput:
        """The tokens of `output` that come before the stop, kept for `partial` if it streams."""
        end = output.start + len(output.token_ids)
        limit = end if self.stop is None else min(end, self.stop.num_tokens)
        new = head(output, max(0, limit - output.start))
        self.num_sent = max(self.num_sent, limit)
        if self._running is not None:
            self._running.add(new)
        return new
