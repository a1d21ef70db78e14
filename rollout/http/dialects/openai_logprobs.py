"""Logprobs as OpenAI's two routes show them, with vLLM's spelling of tokens by id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.protocol import FloatArray, IntArray, RequestOutput, TopLogprobs
from rollout.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TokenText:
    """How tokens are written: "token_id:N", or their text. tokenizer: None for ids only."""

    tokenizer: Tokenizer | None
    as_ids: bool

    def __call__(self, token_id: int) -> str:
        """Text of one token."""
        if self.as_ids or self.tokenizer is None:
            return f"token_id:{token_id}"
        return self.tokenizer.decode([token_id], skip_special_tokens=False)


def completion_logprobs(
    output: RequestOutput, count: int, text: TokenText, offset: int
) -> dict[str, Any]:
    """`logprobs` of a completion choice. count: alternatives wanted; vLLM adds the token that
    was sampled to them. offset: characters of the output before this part."""
    ids, logprobs = output.token_ids.tolist(), output.logprobs.tolist()
    tokens = [text(token_id) for token_id in ids]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    rows = zip(_top_pairs(output.top, count, len(ids)), tokens, logprobs, strict=True)
    tops = [
        {**{text(other): value for other, value in pairs}, token: logprob}
        for pairs, token, logprob in rows
    ]
    return {
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def chat_logprobs(output: RequestOutput, count: int, text: TokenText) -> dict[str, Any]:
    """`logprobs` of a chat choice: one entry a token, its likeliest alternatives inside."""
    rows = zip(
        output.token_ids.tolist(),
        output.logprobs.tolist(),
        _top_pairs(output.top, count, len(output.token_ids)),
        strict=True,
    )
    return {
        "content": [
            {
                **_entry(text, token_id, logprob),
                "top_logprobs": [_entry(text, other, value) for other, value in pairs],
            }
            for token_id, logprob, pairs in rows
        ],
        "refusal": None,
    }


def prompt_logprobs(
    prompt_ids: IntArray, output: RequestOutput, count: int, tokenizer: Tokenizer | None
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: by position, the `count` likeliest tokens and the prompt's own,
    keyed by id; null for position 0. The rank of a token outside the `count` likeliest is not
    known and given as `count` + 1.
    """
    text = TokenText(tokenizer=tokenizer, as_ids=False)
    found: list[dict[str, Any] | None] = [None]
    scores: FloatArray | None = output.prompt_logprobs
    if scores is None:
        return found
    rows = zip(
        prompt_ids[1 : 1 + len(scores)].tolist(),
        scores.tolist(),
        _top_pairs(output.prompt_top, count, len(scores)),
        strict=True,
    )
    for token_id, score, pairs in rows:
        entries = {
            str(other): _scored(text, other, value, rank)
            for rank, (other, value) in enumerate(pairs, start=1)
        }
        entries.setdefault(str(token_id), _scored(text, token_id, score, len(pairs) + 1))
        found.append(entries)
    return found


def _top_pairs(
    top: TopLogprobs | None, count: int, num_tokens: int
) -> list[list[tuple[int, float]]]:
    if top is None or count == 0:
        return [[] for _ in range(num_tokens)]
    return [
        list(zip(ids[:count].tolist(), logprobs[:count].tolist(), strict=True))
        for ids, logprobs in zip(top.ids, top.logprobs, strict=True)
    ]


def _entry(text: TokenText, token_id: int, logprob: float) -> dict[str, Any]:
    token = text(token_id)
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def _scored(text: TokenText, token_id: int, logprob: float, rank: int) -> dict[str, Any]:
    return {"logprob": logprob, "rank": rank, "decoded_token": text(token_id)}
