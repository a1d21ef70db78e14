"""How likely labels are behind a prompt: a judge that is read, and says nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import Response

from engine.errors import InvalidRequest
from engine.protocol import FloatArray, GenerateRequest, SamplingParams
from rollout.http.edge.errors import json_response
from rollout.http.native.sample import Sample
from rollout.http.openai.bodies import prompts_of
from rollout.http.scoring.bodies import LabelBody
from rollout.http.scoring.call import ScoringCall, not_finished, require, run_prompts
from rollout.http.scoring.prompts import Prompt, encoded, places
from rollout.http.scoring.vectors import softmax
from rollout.http.services import Services

# The one token that is drawn is of no interest; the distribution it is drawn from is, at the
# temperature 1 that greedy logprobs have.
_ONE_TOKEN = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
_INLINE_NUMBERS = 1 << 16
_MOST = 1 << 27


async def score_labels(services: Services, body: LabelBody) -> Response:
    """SGLang's reply: for each item the probability of each label as the next token, of one prefill
    a prompt. Raises InvalidRequest naming the field."""
    require(services, body, "generate")
    if not body.label_token_ids:
        raise InvalidRequest("label_token_ids is empty; name a token", field="label_token_ids")
    items = await services.generator.parsed(prompts_of, body.items, "items")
    prompts = _joined(body, items)
    call = await run_prompts(
        services,
        body,
        await encoded(services, prompts, body, field="items"),
        task="generate",
        prefix="score",
        places=places("items", len(prompts)),
        base=GenerateRequest(
            sampling_params=_ONE_TOKEN,
            return_logprob=True,
            token_ids_logprob=body.label_token_ids,
        ),
    )
    if len(prompts) * len(body.label_token_ids) <= _INLINE_NUMBERS:
        return _reply(body, call)
    return await services.generator.workers.run(_reply, body, call)


def _reply(body: LabelBody, call: ScoringCall) -> Response:
    weigh = among if body.apply_softmax else likelihoods
    return json_response(
        {
            "object": "scoring",
            "model": call.services.config.model_name,
            "scores": [weigh(_logprobs(sample)) for sample in call.samples],
            "usage": call.usage(),
            "weight_versions": list(dict.fromkeys(call.versions())),
        }
    )


def _joined(body: LabelBody, items: list[str] | list[list[int]]) -> list[Prompt]:
    """Each item with the query, which would be held once an item: so of bounded size."""
    size = sum(map(len, items)) + len(items) * len(body.query)
    if size > _MOST:
        raise InvalidRequest(
            f"the query and the items are {size} characters or ids together, an item each with the "
            f"query; at most {_MOST} fit into one call, so send several",
            field="items",
        )
    found: list[Prompt] = []
    for place, item in zip(places("items", len(items)), items, strict=True):
        query: Any = body.query
        if not isinstance(item, type(query)):
            kind = "text" if isinstance(query, str) else "ids"
            raise InvalidRequest(
                f"query is {kind} and {place} is not; send both alike", field=place
            )
        found.append(item + query if body.item_first else query + item)
    return found


def _logprobs(sample: Sample) -> FloatArray:
    top = sample.output.top
    if top is None or len(top.logprobs) == 0:
        raise not_finished(sample)
    row: FloatArray = top.logprobs[0]
    return row


def likelihoods(logprobs: FloatArray) -> list[float]:
    """The probability of each label in the whole vocabulary."""
    found: list[float] = np.exp(logprobs.astype(np.float64)).tolist()
    return found


def among(logprobs: FloatArray) -> list[float]:
    """The probability of each label where one of them comes; alike if none can."""
    if np.isneginf(logprobs).all():
        return [1.0 / len(logprobs)] * len(logprobs)
    return softmax(logprobs)
