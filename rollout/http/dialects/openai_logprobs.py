"""Logprobs as OpenAI's two routes show them, with vLLM's spelling of tokens by id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.protocol import FloatArray, IntArray, RequestOutput, TopLogprobs
from rollout.outputs import finite_logprobs
from rollout.text.detokenizer import IncrementalDecoder
from rollout.text.token_bytes import spelled
from rollout.text.tokenizer import Tokenizer

Pairs = list[tuple[int, float]]
Columns = dict[str, list[Any]]


@dataclass(frozen=True, kw_only=True)
class _Speller:
    """How tokens are written: "token_id:N", or their bytes. tokenizer: None for ids only."""

    tokenizer: Tokenizer | None
    as_ids: bool

    def raw(self, token_id: int) -> bytes | None:
        """Bytes of one token; None without a tokenizer."""
        return None if self.tokenizer is None else self.tokenizer.token_bytes(token_id)

    def __call__(self, token_id: int, raw: bytes | None = None) -> str:
        """One token; raw: its bytes where it stands, if known."""
        raw = self.raw(token_id) if raw is None else raw
        return f"token_id:{token_id}" if self.as_ids or raw is None else spelled(raw)


class TokenWriter:
    """Writes the tokens of one sample, in their order, as its logprobs show them.

    tokenizer: None for a model without text. as_ids: tokens are written "token_id:N".
    prompt_ids: the tokens before the first one written.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        as_ids: bool,
        skip_special_tokens: bool,
        prompt_ids: IntArray | Sequence[int] = (),
    ) -> None:
        self._speller = _Speller(tokenizer=tokenizer, as_ids=as_ids)
        self._decoder = None
        if tokenizer is not None:
            self._decoder = IncrementalDecoder(
                tokenizer, skip_special_tokens=skip_special_tokens, prompt_ids=prompt_ids
            )

    def echo(self, prompt_ids: Sequence[int], output: RequestOutput, count: int) -> Columns:
        """The prompt's part of a completion's `logprobs`: null where nothing was scored, as for
        the first token. Arguments as in `completion`."""
        scored = [] if output.prompt_logprobs is None else output.prompt_logprobs.tolist()
        scores = [None, *scored][: len(prompt_ids)]
        pairs = [None, *_top_pairs(output.prompt_top, count, len(scored))][: len(prompt_ids)]
        missing = [None] * (len(prompt_ids) - len(scores))
        found = self._columns(prompt_ids, [*scores, *missing], [*pairs, *missing])
        # The output is decoded as a text of its own.
        if self._decoder is not None:
            self._decoder.flush()
        return found

    def completion(self, output: RequestOutput, count: int, num_chars: int) -> Columns:
        """The `logprobs` of a completion choice. count: alternatives wanted; vLLM adds the token
        that was sampled to them. num_chars: of the text so far, in which every offset lies; a
        stop string and its token may have been cut off it."""
        ids = output.token_ids.tolist()
        pairs = _top_pairs(output.top, count, len(ids))
        found = self._columns(ids, output.logprobs.tolist(), pairs)
        found["text_offset"] = [min(offset, num_chars) for offset in found["text_offset"]]
        return found

    def chat(self, output: RequestOutput, count: int) -> dict[str, Any]:
        """`logprobs` of a chat choice: one entry a token, its likeliest alternatives inside."""
        rows = zip(
            output.token_ids.tolist(),
            output.logprobs.tolist(),
            _top_pairs(output.top, count, len(output.token_ids)),
            strict=True,
        )
        content = []
        for token_id, logprob, pairs in rows:
            raw, _ = self._place(token_id)
            tops = [
                self._entry(other, value, raw if other == token_id else self._speller.raw(other))
                for other, value in pairs
            ]
            content.append({**self._entry(token_id, logprob, raw), "top_logprobs": tops})
        return {"content": content, "refusal": None}

    def _columns(
        self,
        ids: Sequence[int],
        logprobs: Sequence[float | None],
        tops: Sequence[Pairs | None],
    ) -> Columns:
        found: Columns = {
            "tokens": [],
            "token_logprobs": list(logprobs),
            "top_logprobs": [],
            "text_offset": [],
        }
        for token_id, logprob, pairs in zip(ids, logprobs, tops, strict=True):
            raw, offset = self._place(token_id)
            token = self._speller(token_id, raw)
            found["tokens"].append(token)
            found["text_offset"].append(offset)
            if pairs is None or logprob is None:
                found["top_logprobs"].append(None)
            else:
                found["top_logprobs"].append(self._keyed(pairs, token_id, token, logprob))
        return found

    def _keyed(self, pairs: Pairs, token_id: int, token: str, logprob: float) -> dict[str, float]:
        """Alternatives by their text, the token itself among them. Where two tokens have the same
        text, the less likely is written by its id."""
        own = {token: logprob}
        found: dict[str, float] = {}
        for other, value in pairs:
            if other == token_id:
                found |= own
                continue
            text = self._speller(other)
            taken = text in found or text in own
            found[f"token_id:{other}" if taken else text] = value
        return found | own

    def _place(self, token_id: int) -> tuple[bytes | None, int]:
        if self._decoder is None:
            return None, 0
        placed = self._decoder.place(token_id)
        return placed.raw, placed.offset

    def _entry(self, token_id: int, logprob: float, raw: bytes | None) -> dict[str, Any]:
        shown = None if raw is None else list(raw)
        return {"token": self._speller(token_id, raw), "logprob": logprob, "bytes": shown}


def prompt_logprobs(
    prompt_ids: IntArray, output: RequestOutput, count: int, tokenizer: Tokenizer | None
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: by position, the `count` likeliest tokens and the prompt's own,
    keyed by id; null for position 0. The rank of a token outside the `count` likeliest is not
    known and given as `count` + 1.
    """
    text = _Speller(tokenizer=tokenizer, as_ids=False)
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
        list(zip(ids.tolist(), logprobs, strict=True))
        for ids, logprobs in zip(
            top.ids[:, :count], finite_logprobs(top.logprobs[:, :count]), strict=True
        )
    ]


def _scored(text: _Speller, token_id: int, logprob: float, rank: int) -> dict[str, Any]:
    return {"logprob": logprob, "rank": rank, "decoded_token": text(token_id)}
