"""What completions and chat share: ids, usage, finish reasons, and running a call."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from engine.errors import InvalidRequest
from engine.protocol import FinishReason, GenerateRequest
from rollout.http.native.generate_call import GenerateCall
from rollout.http.native.sample import Sample, SampleDelta
from rollout.http.openai.bodies import ChatBody, CompletionBody, renamed
from rollout.http.openai.logprobs import TokenWriter, prompt_logprobs
from rollout.http.openai.model_routes import check_model
from rollout.http.openai.structured import named_grammar
from rollout.http.services import Services
from rollout.http.updates.version_labels import VersionLabels
from rollout.requests.sample_ids import check_client_id, sample_id
from rollout.scheduler.routes.reply_fields import npy_routes

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class OpenAICall:
    """One POST of either route, on its way."""

    services: Services
    body: CompletionBody | ChatBody
    call: GenerateCall
    samples: list[Sample]
    object: str
    created: int

    def envelope(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The reply, or a frame of it, around its choices."""
        return {
            "id": self.call.prefix,
            "object": self.object,
            "created": self.created,
            "model": self.services.config.model_name,
            "choices": choices,
            **more,
        }

    async def choices(
        self,
        write: Callable[[Sample, int], T],
        choose: Callable[[Sequence[Sample]], Sequence[int]] | None = None,
    ) -> list[T]:
        """Run to the end; what `write` makes of every sample and its index, in their order.

        choose: the indices of the samples to write, once all have finished; None for all.
        """
        generator = self.services.generator
        with _as_named(self.body):
            await generator.finish(self.samples)
        indices = range(len(self.samples)) if choose is None else choose(self.samples)
        return [await generator.written(write, self.samples[index], index) for index in indices]

    async def outputs(self) -> AsyncGenerator[tuple[int, Sample, SampleDelta], None]:
        """What every output added, with the index of its sample."""
        position = {id(sample): index for index, sample in enumerate(self.samples)}
        generator = self.services.generator
        with _as_named(self.body):
            async with aclosing(generator.run(self.samples)) as outputs:
                async for sample, delta in outputs:
                    yield position[id(sample)], sample, delta

    def num_likeliest(self, wanted: int) -> int:
        """How many of the likeliest tokens are meant: by -1, the whole vocabulary."""
        return self.services.engine.facts.vocab_size if wanted < 0 else wanted

    def prompt_scores(self, sample: Sample) -> list[dict[str, Any] | None] | None:
        """vLLM's `prompt_logprobs` of a finished sample; None where they are not asked for."""
        wanted = self.body.prompt_logprobs
        if wanted is None:
            return None
        ids, tokenizer = sample.request.prompt_ids, self.services.tokenizer
        return prompt_logprobs(ids, sample.output, self.num_likeliest(wanted), tokenizer)

    def usage_frame(self) -> list[dict[str, Any]]:
        """The last frame of a stream, if it was asked for."""
        options = self.body.stream_options
        if options is None or not options.include_usage:
            return []
        return [self.envelope([], usage=usage(self.samples))]


async def start(
    services: Services,
    body: CompletionBody | ChatBody,
    items: Sequence[GenerateRequest],
    *,
    prefix: str,
    object_name: str,
) -> OpenAICall:
    """Expand the items of a call into samples, prompt-major.

    prefix: of the id that the call gets, if its client gave it none. Raises InvalidRequest with
    this dialect's names of the fields, UnknownModel for a model that is not served.
    """
    check_model(services, body.model)
    check_client_id(body.request_id, "request_id")
    rid = body.request_id or f"{prefix}{services.identity.draw_id()}"
    named = [
        msgspec.structs.replace(item, rid=sample_id(rid, number))
        for number, item in enumerate(items)
    ]
    call = GenerateCall(items=named, batch=len(named) > 1, stream=body.stream, prefix=rid)
    with _as_named(body):
        samples = await services.generator.samples(call)
        if (other := services.calls.get(rid)) is not None:
            # Its samples may have other ids than these, if it has more of them.
            services.engine.check_ids([sample.request.rid for sample in other.samples])
    found = OpenAICall(
        services=services,
        body=body,
        call=call,
        samples=samples,
        object=object_name,
        created=services.identity.now(),
    )
    services.calls[rid] = found
    return found


@contextmanager
def _as_named(body: CompletionBody | ChatBody) -> Iterator[None]:
    """Errors of a call speak of the fields of its body."""
    try:
        yield
    except InvalidRequest as error:
        raise named_grammar(renamed(error), body) from error


def token_writer(call: OpenAICall, sample: Sample, *, echo: bool = False) -> TokenWriter:
    """What writes the logprobs of a sample, its output first, or with `echo` its prompt."""
    return TokenWriter(
        call.services.tokenizer,
        as_ids=bool(call.body.return_tokens_as_token_ids),
        skip_special_tokens=sample.request.sampling.skip_special_tokens,
        prompt_ids=() if echo else sample.request.prompt_ids,
    )


def usage(samples: Sequence[Sample]) -> dict[str, Any]:
    """Counts of tokens; a prompt counts once, however many samples it has. Of a prompt's cached
    tokens those count that none of its samples computed."""
    prompts: dict[str, tuple[int, int]] = {}
    for sample in samples:
        size, cached = len(sample.request.prompt_ids), sample.output.cached_tokens
        _, least = prompts.get(sample.request.group, (size, cached))
        prompts[sample.request.group] = (size, min(least, cached))
    num_prompt = sum(size for size, _ in prompts.values())
    num_output = sum(len(sample.output.token_ids) for sample in samples)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": sum(least for _, least in prompts.values())},
    }


def finish_fields(finish: FinishReason | None, body: CompletionBody | ChatBody) -> dict[str, Any]:
    """`finish_reason`, and vLLM's `stop_reason`: the stop string or asked-for token, no EOS."""
    if finish is None:
        return {"finish_reason": None, "stop_reason": None}
    matched = finish.matched
    asked = isinstance(matched, str) or matched in (body.stop_token_ids or [])
    return {"finish_reason": finish.type, "stop_reason": matched if asked else None}


def route_fields(sample: Sample, body: CompletionBody | ChatBody) -> dict[str, Any]:
    """vLLM's `routed_experts` of a finished sequence, where its body asks for them."""
    if not body.wants_routes:
        return {}
    return {"routed_experts": npy_routes(sample.output, body.routed_experts_prompt_start or 0)}


def version_fields(sample: Sample, labels: VersionLabels) -> dict[str, Any]:
    """Which weights sampled a finished sequence, beside what the dialect has; of one that masks
    restricted, whose its logprobs are."""
    spans, request = sample.output.spans, sample.request
    law = {"logprob_law": request.logprob_law} if request.masked else {}
    return {
        **law,
        "weight_version": labels.text(spans[-1].version) if spans else None,
        "weight_versions": [
            {"version": labels.text(span.version), "start": span.start, "end": span.end}
            for span in spans
        ],
    }
