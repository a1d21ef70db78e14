"""Runs the prompts of one POST that samples nothing, and writes what its replies share."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from engine.errors import InvalidRequest, SlipstreamError
from engine.protocol import FloatArray, GenerateRequest, Pooling, Task
from rollout.http.native.generate_call import GenerateCall
from rollout.http.native.sample import Sample
from rollout.http.openai.call import usage
from rollout.http.openai.model_routes import check_model
from rollout.http.scoring.bodies import Body
from rollout.http.services import Services
from rollout.requests.sample_ids import check_client_id, sample_id
from rollout.scheduler.validate import why_not

_NAMES = {
    "rid": "request_id",
    "token_ids_logprob": "label_token_ids",
    "top_logprobs_num": "label_token_ids",
}
"""Fields of the native dialect as these bodies call them."""


class NoResult(SlipstreamError):
    """A prompt was aborted before it had its result."""

    status = 503


@dataclass(frozen=True, kw_only=True)
class ScoringCall:
    """One POST on its way; `samples` are one a prompt, in their order."""

    services: Services
    id: str
    samples: list[Sample]
    created: int = field(default_factory=lambda: int(time.time()))

    def reply(self, data: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """OpenAI's list around the entries of a reply."""
        return {
            "id": self.id,
            "object": "list",
            "created": self.created,
            "model": self.services.config.model_name,
            "data": data,
            "usage": self.usage(),
            "weight_versions": list(dict.fromkeys(self.versions())),
        }

    def usage(self) -> dict[str, Any]:
        """Counts of tokens: those of prompts are all there are."""
        found = usage(self.samples)
        return {**found, "completion_tokens": 0, "total_tokens": found["prompt_tokens"]}

    def values(self) -> list[FloatArray]:
        """What the model gave each prompt: its scores, or its embedding. Raises NoResult."""
        return [values_of(sample) for sample in self.samples]

    def versions(self) -> list[str]:
        """Which weights the result of each prompt is of."""
        text = self.services.labels.text
        return [text(sample.output.kv_spans[-1].version) for sample in self.samples]


def values_of(sample: Sample) -> FloatArray:
    """The scores of a finished sample, or its embedding. Raises NoResult where it has neither."""
    output = sample.output
    found = output.scores if output.embedding is None else output.embedding
    if found is None:
        raise not_finished(sample)
    return found


def not_finished(sample: Sample) -> NoResult:
    """What to raise for a sample that ended without its result."""
    why = sample.finish.message if sample.finish is not None else ""
    return NoResult(f"{sample.request.rid}: {why or 'it was aborted'}; send it again", field="rid")


def require(services: Services, body: Body, task: Task) -> None:
    """Raise UnknownModel or InvalidRequest (`model`) unless the model that `body` names is served
    and does `task`; the message says what it can do."""
    check_model(services, body.model)
    if reason := why_not(task, services.engine.facts.num_labels):
        raise InvalidRequest(f"this route has the model {task}, and {reason}", field="model")


async def run_prompts(
    services: Services,
    body: Body,
    prompts: Sequence[list[int]],
    *,
    task: Task,
    pooling: Pooling = "last",
    prefix: str,
    places: Sequence[str],
    base: GenerateRequest | None = None,
) -> ScoringCall:
    """Run prompts of ids to their end.

    prefix: of the ids that the server makes. places: what the body calls each prompt. base: the
    native request without its prompt; None for one that asks for nothing. Raises InvalidRequest
    with the names of the body, and what running raises.
    """
    check_client_id(body.request_id, "request_id")
    rid = body.request_id or f"{prefix}-{uuid.uuid4().hex}"
    base = base or GenerateRequest()
    items = [
        msgspec.structs.replace(
            base,
            input_ids=ids,
            rid=sample_id(rid, number),
            priority=body.priority,
            cache_salt=body.cache_salt or "",
        )
        for number, ids in enumerate(prompts)
    ]
    call = GenerateCall(
        items=items, batch=len(items) > 1, stream=False, prefix=rid, task=task, pooling=pooling
    )
    try:
        samples = await services.generator.samples(call)
        if (other := services.calls.get(rid)) is not None:
            services.engine.check_ids([sample.request.rid for sample in other.samples])
    except InvalidRequest as error:
        raise _renamed(error, places) from error
    found = ScoringCall(services=services, id=rid, samples=samples)
    services.calls[rid] = found
    await services.generator.finish(samples)
    return found


def _renamed(error: InvalidRequest, places: Sequence[str]) -> InvalidRequest:
    """The error with the names of the body: "[2].input_ids" is what the third prompt is called."""
    item, _, name = error.field.rpartition(".")
    number = int(item.strip("[]")) if item else 0
    # What is said of no item is said of all.
    place = places[number] if item or len(places) == 1 else places[0].partition("[")[0]
    own = {"input_ids": place, **_NAMES}.get(name, name)
    message = error.message.removeprefix(f"item {number}: ")
    return type(error)(message.replace(name, own) if name else message, field=own)
