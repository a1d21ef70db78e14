"""Scores of pairs of texts: by a cross-encoder, or as the cosine of two embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.errors import InvalidRequest
from rollout.http.native.sample import Sample
from rollout.http.scoring.bodies import PairBody, RerankBody
from rollout.http.scoring.call import ScoringCall, require, run_prompts
from rollout.http.scoring.prompts import encoded, places
from rollout.http.scoring.vectors import sigmoid, unit
from rollout.http.services import Services


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Each text of `seconds` with the one of `firsts` in its place, or the only one. names: what
    the body calls the two."""

    firsts: Sequence[str]
    seconds: Sequence[str]
    names: tuple[str, str]

    def joined(self) -> list[tuple[str, str]]:
        """The pairs."""
        firsts = self.firsts if len(self.firsts) > 1 else list(self.firsts) * len(self.seconds)
        return list(zip(firsts, self.seconds, strict=True))


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Pairs with their scores. call: what gave them. samples: for each pair, the prompt that has
    its second text."""

    scores: list[float]
    call: ScoringCall
    samples: list[Sample]


async def score_pairs(
    services: Services, body: PairBody | RerankBody, pairs: Pairs, *, prefix: str
) -> Scored:
    """A score for each pair.

    A sequence classifier of one label reads both texts as one, joined as its tokenizer joins pairs
    (a cross-encoder: Nogueira and Cho, arXiv 1901.04085). Any other model embeds each text, once if
    it comes several times. Raises InvalidRequest naming a text, or `model` for a classifier of
    several labels.
    """
    count = services.engine.facts.num_labels
    if count == 0:
        return await _cosines(services, body, pairs, prefix)
    require(services, body, "classify")
    if count > 1:
        raise InvalidRequest(
            f"this model gives a text {count} scores, one a label, where a pair has one; have it "
            "classify (POST /classify), or serve a checkpoint of one label",
            field="model",
        )
    joined, second = pairs.joined(), pairs.names[1]
    call = await run_prompts(
        services,
        body,
        await encoded(services, joined, body, field=second),
        task="classify",
        prefix=prefix,
        places=places(second, len(joined)),
    )
    logits = [float(values[0]) for values in call.values()]
    scores = [sigmoid(logit) if body.use_activation else logit for logit in logits]
    return Scored(scores=scores, call=call, samples=call.samples)


async def _cosines(
    services: Services, body: PairBody | RerankBody, pairs: Pairs, prefix: str
) -> Scored:
    require(services, body, "embed")
    asked: dict[str, tuple[list[int], str]] = {}
    for texts, name in zip((pairs.firsts, pairs.seconds), pairs.names, strict=True):
        ids = await encoded(services, texts, body, field=name)
        for text, own, place in zip(texts, ids, places(name, len(texts)), strict=True):
            asked.setdefault(text, (own, place))
    call = await run_prompts(
        services,
        body,
        [ids for ids, _ in asked.values()],
        task="embed",
        pooling=body.pooling,
        prefix=prefix,
        places=[place for _, place in asked.values()],
    )
    vectors = dict(zip(asked, map(unit, call.values()), strict=True))
    samples = dict(zip(asked, call.samples, strict=True))
    return Scored(
        scores=[float(np.dot(vectors[one], vectors[two])) for one, two in pairs.joined()],
        call=call,
        samples=[samples[two] for _, two in pairs.joined()],
    )
