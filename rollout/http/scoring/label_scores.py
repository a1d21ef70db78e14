"""How likely labels are behind a prompt: a judge that is read, and says nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from engine.errors import InvalidRequest
from engine.protocol import GenerateRequest, SamplingParams
from rollout.http.native.sample import Sample
from rollout.http.openai.bodies import prompts_of
from rollout.http.scoring.bodies import LabelBody
from rollout.http.scoring.call import ScoringCall, not_finished, require, run_prompts
from rollout.http.scoring.prompts import Prompt, encoded, places
from rollout.http.services import Services

# The one token that is drawn is of no interest; the distribution it is drawn from is, at the
# temperature 1 that greedy logprobs have.
_ONE_TOKEN = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)


async def score_labels(
    services: Services, body: LabelBody
) -> tuple[list[list[float]], ScoringCall]:
    """For each item the probability of each label as the next token, of one prefill a prompt, and
    the call that gave them. Raises InvalidRequest naming the field."""
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
    rows = [_logprobs(sample) for sample in call.samples]
    weigh = among if body.apply_softmax else likelihoods
    return [weigh(row) for row in rows], call


def _joined(body: LabelBody, items: list[str] | list[list[int]]) -> list[Prompt]:
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


def _logprobs(sample: Sample) -> list[float]:
    top = sample.output.top
    if top is None or len(top.logprobs) == 0:
        raise not_finished(sample)
    row: list[float] = top.logprobs[0].tolist()
    return row


def likelihoods(logprobs: Sequence[float]) -> list[float]:
    """The probability of each label in the whole vocabulary."""
    return [math.exp(logprob) for logprob in logprobs]


def among(logprobs: Sequence[float]) -> list[float]:
    """The probability of each label where one of them comes; alike if none can."""
    most = max(logprobs)
    if most == -math.inf:
        return [1.0 / len(logprobs)] * len(logprobs)
    weights = [math.exp(logprob - most) for logprob in logprobs]
    return [weight / sum(weights) for weight in weights]


def reply_of(scores: list[list[float]], call: ScoringCall) -> dict[str, object]:
    """SGLang's reply."""
    return {
        "object": "scoring",
        "model": call.services.config.model_name,
        "scores": scores,
        "usage": call.usage(),
        "weight_versions": list(dict.fromkeys(call.versions())),
    }
