"""Which of some texts is the likeliest to follow, by the logprobs of their tokens.

Every choice is scored whole, as a prompt whose last tokens it is: the engine returns their
logprobs and samples nothing. A constrained draw would follow one path token by token, of which the
likeliest first token need not begin the likeliest text, and would tell nothing of the others. All
choices are in the engine at once, where they share the KV of what comes before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from engine.errors import InvalidRequest
from engine.protocol import GenerateRequest, SamplingParams
from rollout.programs.backends.base import Session
from rollout.programs.concurrently import together
from rollout.programs.generated import Selected, finish_of
from rollout.text.tokenizer import Tokenizer

Normalise = Literal["none", "tokens"]
"""What choices are compared by: the logprob of the text, or that a token of it in the mean."""

_SCORED = SamplingParams(max_new_tokens=0, sampling_seed=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """The logprobs of a choice's tokens, and what was cached of the request."""

    token_ids: list[int]
    logprobs: list[float]
    prompt_tokens: int
    cached_tokens: int


async def score(
    session: Session, tokenizer: Tokenizer, prompt: list[int], choices: Sequence[str]
) -> list[Score]:
    """The score of every choice behind `prompt`. Raises InvalidRequest (`choices`) for two that are
    equal and for an empty one."""
    if len(set(choices)) < len(choices) or not all(choices):
        raise InvalidRequest("choices must be texts that differ, none empty", field="choices")
    encoded = [tokenizer.encode(choice, add_special_tokens=False) for choice in choices]
    return await together([_score(session, prompt, ids) for ids in encoded])


async def _score(session: Session, prompt: list[int], ids: list[int]) -> Score:
    wire = GenerateRequest(
        input_ids=prompt + ids,
        sampling_params=_SCORED,
        return_logprob=True,
        logprob_start_len=len(prompt),
    )
    meta = (await session.generate(wire)).meta_info
    finish_of(meta)
    return Score(
        token_ids=ids,
        logprobs=[entry[0] for entry in meta["input_token_logprobs"]],
        prompt_tokens=meta["prompt_tokens"],
        cached_tokens=meta["cached_tokens"],
    )


def likeliest(
    name: str, choices: Sequence[str], scores: Sequence[Score], normalise: Normalise
) -> Selected:
    """The choice with the best score; of two that are alike, the first. Raises InvalidRequest
    (`normalise`)."""
    if normalise not in get_args(Normalise):
        raise InvalidRequest(
            f"normalise is {normalise!r}; give one of {', '.join(get_args(Normalise))}",
            field="normalise",
        )
    totals = [sum(found.logprobs) for found in scores]
    sizes = [len(found.logprobs) if normalise == "tokens" else 1 for found in scores]
    index = max(range(len(totals)), key=lambda place: totals[place] / sizes[place])
    return Selected(
        name=name,
        text=choices[index],
        index=index,
        logprobs=totals,
        num_tokens=[len(found.token_ids) for found in scores],
        token_ids=scores[index].token_ids,
        prompt_tokens=sum(found.prompt_tokens for found in scores),
        cached_tokens=sum(found.cached_tokens for found in scores),
    )
