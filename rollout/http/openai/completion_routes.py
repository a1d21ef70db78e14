"""POST /v1/completions, with the fields that TRL reads (docs/external_trainers.md)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import msgspec
from fastapi import Request, Response

from engine.errors import InvalidRequest, UnsupportedOption
from engine.protocol import GenerateRequest, RequestOutput
from rollout.http.edge.errors import json_response
from rollout.http.edge.read_body import whole_body
from rollout.http.edge.routes import Routes
from rollout.http.edge.sse import EventStream, answer
from rollout.http.native.generate_call import check_prompt, prompt_room
from rollout.http.native.long_prompts import check_long_prompt
from rollout.http.native.sample import Sample, SampleDelta
from rollout.http.openai.bodies import CompletionBody, base_request, parse_openai, prompts_of
from rollout.http.openai.call import (
    OpenAICall,
    finish_fields,
    route_fields,
    start,
    token_writer,
    usage,
    version_fields,
)
from rollout.http.openai.logprobs import Written, columns
from rollout.http.openapi import takes
from rollout.http.services import Services
from rollout.requests.expand import check_text, check_total
from rollout.text.detokenizer import IncrementalDecoder

_DEFAULT_TOKENS = 16


def router(services: Services) -> Routes:
    """The route."""
    routes = Routes()

    async def completions(request: Request) -> Response:
        return await answer(request, complete(services, await whole_body(request)))

    routes.add_api_route(
        "/v1/completions", completions, methods=["POST"], openapi_extra=takes(CompletionBody)
    )
    return routes


async def complete(services: Services, data: bytes) -> Response:
    """The reply to one body. Raises the typed error that it is refused or fails with."""
    room = prompt_room(services.engine.facts, services.tokenizer)
    check_long_prompt(data, text_bytes=room.text_bytes, num_ids=room.num_ids)
    body = await services.generator.parsed(parse_openai, data, CompletionBody)
    _check_best_of(body, services.engine.facts.max_samples)
    items = await _items(services, body)
    call = await start(services, body, items, prefix="cmpl-", object_name="text_completion")
    writer = _CompletionChoices(call, body)
    return EventStream(writer.frames()) if body.stream else await writer.reply()


def _check_best_of(body: CompletionBody, max_samples: int) -> None:
    if body.best_of is None or body.best_of == body.n:
        return
    if not body.n <= body.best_of <= max_samples:
        raise InvalidRequest(
            f"best_of is {body.best_of}; give n, which is {body.n}, to {max_samples}",
            field="best_of",
        )
    if body.stream:
        raise UnsupportedOption(
            "which are the best is known at the end; a stream has no best_of, leave it out",
            field="best_of",
        )


def _best(samples: Sequence[Sample], num_drawn: int, num_kept: int) -> list[int]:
    """Of every `num_drawn` samples the `num_kept` with the greatest mean logprob, best first."""

    def mean(index: int) -> float:
        logprobs = samples[index].output.logprobs
        return float(logprobs.mean()) if len(logprobs) else 0.0

    found: list[int] = []
    for first in range(0, len(samples), num_drawn):
        group = range(first, first + num_drawn)
        found += sorted(group, key=mean, reverse=True)[:num_kept]
    return found


async def _items(services: Services, body: CompletionBody) -> list[GenerateRequest]:
    base = base_request(
        body if body.best_of is None else msgspec.structs.replace(body, n=body.best_of),
        max_tokens=_DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens,
        top_logprobs=body.logprobs,
        vocab_size=services.engine.facts.vocab_size,
    )
    if body.echo and (body.logprobs is not None or body.max_tokens == 0):
        # Without a token to sample, the engine is asked for the prompt's scores at least.
        base = msgspec.structs.replace(base, return_logprob=True, logprob_start_len=0)
    return [
        msgspec.structs.replace(base, text=text, input_ids=ids)
        for text, ids in await _texts_and_ids(services, body)
    ]


async def _texts_and_ids(
    services: Services, body: CompletionBody
) -> Sequence[tuple[str | None, list[int] | None]]:
    tokenizer = services.tokenizer
    pairs: list[tuple[str | None, list[int] | None]] = []
    facts = services.engine.facts
    check_prompt(body.prompt, prompt_room(facts, tokenizer), "prompt")
    prompts = await services.generator.parsed(prompts_of, body.prompt)
    check_total(len(prompts), facts, field="prompt")
    for prompt in prompts:
        if not isinstance(prompt, str):
            pairs.append((None, prompt))
        elif body.add_special_tokens:
            pairs.append((prompt, None))
        elif tokenizer is None:
            raise InvalidRequest("this model has no tokenizer; send ids", field="prompt")
        else:
            check_text(prompt, tokenizer, facts.context_length, field="prompt")
            ids = await services.generator.encoded(prompt, many=len(prompts) > 1)
            pairs.append((None, ids))
    return pairs


class _CompletionChoices:
    """Writes the choices of one call."""

    def __init__(self, call: OpenAICall, body: CompletionBody) -> None:
        self._call = call
        self._body = body
        self._services = call.services
        self._echo = bool(body.echo)
        self._writers = [token_writer(call, sample, echo=self._echo) for sample in call.samples]

    async def reply(self) -> Response:
        """Run to the end; choices prompt-major."""
        drawn, kept = self._body.best_of, self._body.n
        choose = None if drawn is None else partial(_best, num_drawn=drawn, num_kept=kept)
        choices = await self._call.choices(self._whole, choose)
        numbered = [{**choice, "index": index} for index, choice in enumerate(choices)]
        return json_response(self._call.envelope(numbered, usage=usage(self._call.samples)))

    async def frames(self) -> AsyncGenerator[dict[str, Any], None]:
        """A frame for every output; the first of a choice has its prompt, if it is echoed."""
        call = self._call
        num_chars = [0] * len(call.samples)
        begun: set[int] = set()
        async with aclosing(call.outputs()) as outputs:
            async for index, sample, delta in outputs:
                first = index not in begun
                begun.add(index)
                text = (self._prompt_text(sample) if first else "") + delta.text
                num_chars[index] += len(text)
                part = self._part(index, sample, delta, num_chars[index], first=first)
                yield call.envelope([{**part, "text": text}])
        for frame in call.usage_frame():
            yield frame

    def _whole(self, sample: Sample, index: int) -> dict[str, Any]:
        text = self._prompt_text(sample) + sample.text
        rows = self._rows(index, sample, sample.output, None, first=True)
        return {
            "index": index,
            "text": text,
            "logprobs": None if rows is None else columns(rows, len(text)),
            **finish_fields(sample.finish, self._body),
            **self._ids(sample, sample.output.token_ids.tolist(), prompt=True),
            "prompt_logprobs": self._call.prompt_scores(sample),
            **version_fields(sample, self._services.labels),
            **route_fields(sample, self._body),
        }

    def _part(
        self, index: int, sample: Sample, delta: SampleDelta, num_chars: int, *, first: bool
    ) -> dict[str, Any]:
        finish = sample.finish if delta.finished else None
        certain = None if delta.finished else num_chars
        rows = self._rows(index, sample, delta.output, certain, first=first)
        ids = delta.output.token_ids.tolist()
        if rows is not None:
            # Beside the logprobs of the same tokens.
            ids = [row.token_id for row in rows[self._num_echoed(sample, first) :]]
        choice = {
            "index": index,
            "text": "",
            "logprobs": None if rows is None else columns(rows, num_chars),
            **finish_fields(finish, self._body),
            **self._ids(sample, ids, prompt=delta.output.start == 0),
        }
        if delta.finished:
            choice |= version_fields(sample, self._services.labels)
            choice |= route_fields(sample, self._body)
        return choice

    def _prompt_text(self, sample: Sample) -> str:
        """The prompt as its tokens say it, where it is echoed."""
        tokenizer = self._services.tokenizer
        if not self._echo or tokenizer is None:
            return ""
        skip = sample.request.sampling.skip_special_tokens
        decoder = IncrementalDecoder(tokenizer, skip_special_tokens=skip)
        return decoder.whole(sample.request.prompt_ids.tolist())

    def _rows(
        self,
        index: int,
        sample: Sample,
        output: RequestOutput,
        num_chars: int | None,
        *,
        first: bool,
    ) -> list[Written] | None:
        """The tokens whose logprobs are written now, behind those of the prompt where it is echoed
        with them; None if nobody wants logprobs."""
        count = self._body.logprobs
        if count is None:
            return None
        count = self._call.num_likeliest(count)
        writer, prompt = self._writers[index], []
        if self._num_echoed(sample, first):
            prompt = writer.echo(sample.request.prompt_ids.tolist(), output, count)
        return prompt + writer.completion(output, count, num_chars)

    def _num_echoed(self, sample: Sample, first: bool) -> int:
        """Tokens of the prompt that a frame begins with."""
        return len(sample.request.prompt_ids) if self._echo and first else 0

    def _ids(self, sample: Sample, ids: list[int], *, prompt: bool) -> dict[str, Any]:
        if not self._body.return_token_ids:
            return {}
        prompt_ids = sample.request.prompt_ids.tolist() if prompt else None
        return {"prompt_token_ids": prompt_ids, "token_ids": ids}
