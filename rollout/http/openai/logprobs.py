"""Logprobs as OpenAI's two routes show them, with vLLM's spelling of tokens by id."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.protocol import FloatArray, IntArray, RequestOutput, TopLogprobs
from rollout.requests.outputs import finite_logprobs
from rollout.text.detokenizer import IncrementalDecoder
from rollout.text.token_bytes import spelled
from rollout.text.tokenizer import Tokenizer

Pairs = list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """One token of a completion: how it is written, its logprob and those of its alternatives
    (None where nothing was scored), and where it begins in the text."""

    token_id: int
    token: str
    logprob: float | None
    top: dict[str, float] | None
    offset: int


def columns(rows: Sequence[Written], num_chars: int) -> dict[str, list[Any]]:
    """The `logprobs` of a completion choice. num_chars: of its text, in which every offset lies;
    a stop string and its tokens may have been cut off it."""
    return {
        "tokens": [row.token for row in rows],
        "token_logprobs": [row.logprob for row in rows],
        "top_logprobs": [row.top for row in rows],
        "text_offset": [min(row.offset, num_chars) for row in rows],
    }


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
        self._kept: list[Written] = []
        self._decoder = None
        if tokenizer is not None:
            self._decoder = IncrementalDecoder(
                tokenizer, skip_special_tokens=skip_special_tokens, prompt_ids=prompt_ids
            )

    def echo(self, prompt_ids: Sequence[int], output: RequestOutput, count: int) -> list[Written]:
        """The prompt of a completion. output: the first of its sample, with the prompt's scores;
        nothing precedes the first token, so it has none. count: as in `completion`."""
        scored = [] if output.prompt_logprobs is None else output.prompt_logprobs.tolist()
        scores = [None, *scored][: len(prompt_ids)]
        pairs = [None, *_top_pairs(output.prompt_top, count, len(scored))][: len(prompt_ids)]
        missing = [None] * (len(prompt_ids) - len(scores))
        found = self._rows(prompt_ids, [*scores, *missing], [*pairs, *missing])
        # The output is decoded as a text of its own.
        if self._decoder is not None:
            self._decoder.flush()
        return found

    def completion(
        self, output: RequestOutput, count: int, num_chars: int | None = None
    ) -> list[Written]:
        """The tokens of a completion choice, and those kept so far. count: alternatives wanted;
        vLLM adds the token that was sampled to them. num_chars: of the text that is certain, if
        more of it will come: tokens that begin beyond it, which may yet turn out to be part of a
        stop string, are kept for the next call."""
        ids = output.token_ids.tolist()
        pairs = _top_pairs(output.top, count, len(ids))
        rows = self._kept + self._rows(ids, output.logprobs.tolist(), pairs)
        ready = len(rows)
        if num_chars is not None:
            ready = bisect_right(rows, num_chars, key=lambda row: row.offset)
        self._kept = rows[ready:]
        return rows[:ready]

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

    def _rows(
        self,
        ids: Sequence[int],
        logprobs: Sequence[float | None],
        tops: Sequence[Pairs | None],
    ) -> list[Written]:
        found = []
        for token_id, logprob, pairs in zip(ids, logprobs, tops, strict=True):
            raw, offset = self._place(token_id)
            token, top = self._speller(token_id, raw), None
            if pairs is not None and logprob is not None:
                top = self._keyed(pairs, token_id, token, logprob)
            row = Written(token_id=token_id, token=token, logprob=logprob, top=top, offset=offset)
            found.append(row)
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
