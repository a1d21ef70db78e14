"""Ids to text while they arrive, and stop strings found in that text.

Two things make this more than `decode`: a character may need several tokens, and a stop
string may lie across tokens. Neither half a character nor the beginning of a stop string
ever leaves here.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from engine.protocol import FinishReason, IntArray, SamplingParams
from rollout.text.tokenizer import Tokenizer

Ids = Sequence[int] | IntArray


@dataclass(frozen=True, kw_only=True)
class StopMatch:
    """A stop string was found. num_tokens: output tokens up to and with its last one."""

    num_tokens: int
    matched: str


@dataclass(frozen=True, kw_only=True)
class TextDelta:
    """Text that became certain, and the stop string that ends it if one was found."""

    text: str
    stop: StopMatch | None = None


@dataclass(frozen=True, slots=True)
class Placed:
    """A token at its place in a text. raw: the bytes it stands for there. offset: characters of
    the text before the one that its first byte belongs to; its end for a token without bytes, or
    a special one that is skipped. text: the characters that it completed."""

    raw: bytes
    offset: int
    text: str


class IncrementalDecoder:
    """Text of a growing list of ids, a token at a time: the UTF-8 of their bytes.

    A character appears with its last byte. Bytes that are no UTF-8 become U+FFFD as soon as that
    is known, one for every maximal part of a character (Unicode 16, section 3.9), so at most
    three bytes are held. prompt_ids: what the ids follow; where it has any text, the first id
    does not begin one, and keeps the space that SentencePiece writes before a word.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool, prompt_ids: Ids = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._added = tokenizer.added_bytes(skip_special_tokens=skip_special_tokens)
        self._first = True
        # Looked at when a token comes: then the engine has found it to be a prompt.
        self._prompt_ids = prompt_ids
        self._num_chars = 0

    def add(self, token_id: int) -> str:
        """Text that `token_id` completes; empty while a character is unfinished."""
        text = self._decode(self._raw(token_id))
        self._num_chars += len(text)
        return text

    def place(self, token_id: int) -> Placed:
        """`add`, with the token's bytes and where they lie."""
        if not self._is_shown(token_id):
            return Placed(self._tokenizer.token_bytes(token_id), self._num_chars, "")
        raw, offset = self._raw(token_id), self._num_chars
        unfinished = bool(self._utf8.getstate()[0])
        text = self._decode(raw[:1])
        # What was unfinished is broken for good, unless this byte goes on with it.
        goes_on = 0x80 <= raw[0] < 0xC0 and len(text) <= 1 if raw else True
        if unfinished and not goes_on:
            offset += 1
        text += self._decode(raw[1:])
        self._num_chars += len(text)
        return Placed(raw, offset, text)

    def flush(self) -> str:
        """What is still held back, part of a character, as U+FFFD."""
        text = self._utf8.decode(b"", True)
        self._num_chars += len(text)
        return text

    def whole(self, token_ids: Sequence[int]) -> str:
        """All that is added by `token_ids`, the last of the text."""
        raw, rest = [], iter(token_ids)
        while self._first and (token_id := next(rest, None)) is not None:
            raw.append(self._raw(token_id))
        raw += map(self._added.__getitem__, rest)
        text = self._utf8.decode(b"".join(raw), True)
        self._num_chars += len(text)
        return text

    def _decode(self, data: bytes) -> str:
        """The text that `data` completes or breaks."""
        text = self._utf8.decode(data)
        held = self._utf8.getstate()[0]
        if len(held) == 2 and held[0] == 0xED and held[1] >= 0xA0:
            # The beginning of a surrogate, which CPython holds though nothing can complete it.
            text += self._utf8.decode(b"", True)
        return text

    def _raw(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text."""
        if not self._first:
            return self._added[token_id]
        prompt_ids, self._prompt_ids = self._prompt_ids, ()
        if any(self._is_shown(int(before)) for before in prompt_ids):
            self._first = False
            return self._added[token_id]
        if not self._is_shown(token_id):
            return b""
        self._first = False
        return self._tokenizer.token_bytes(token_id, first=True)

    def _is_shown(self, token_id: int) -> bool:
        return self._tokenizer.is_shown(token_id, skip_special_tokens=self._skip)


class Detokenizer:
    """One sequence's text, cut at its first stop string.

    A stop string counts only where a token beyond the first `min_new_tokens` completes it, as a
    stop token does. After a match, more tokens are ignored: the engine may have sampled some
    before it heard of the stop. prompt_ids: what the sequence goes on from.
    """

    def __init__(
        self, tokenizer: Tokenizer, sampling: SamplingParams, prompt_ids: Ids = ()
    ) -> None:
        self._decoder = IncrementalDecoder(
            tokenizer,
            skip_special_tokens=sampling.skip_special_tokens,
            prompt_ids=prompt_ids,
        )
        self._min_tokens = sampling.min_new_tokens
        self._stops = stop_strings(sampling)
        self._keep_stop = sampling.no_stop_trim
        self._pending = ""
        self._num_tokens = 0
        self._stop: StopMatch | None = None

    def feed(self, token_ids: Sequence[int]) -> TextDelta:
        """Add output tokens, without the stop token that ended the sequence if its text is
        not wanted (`trim_stop_token`)."""
        texts = []
        for token_id in token_ids:
            if self._stop is not None:
                break
            self._num_tokens += 1
            texts.append(self._release(self._decoder.add(int(token_id))))
        return TextDelta(text="".join(texts), stop=self._stop)

    def finish(self) -> TextDelta:
        """Everything held back: the sequence is over."""
        if self._stop is not None:
            return TextDelta(text="", stop=self._stop)
        text = self._release(self._decoder.flush())
        if self._stop is None:
            text, self._pending = text + self._pending, ""
        return TextDelta(text=text, stop=self._stop)

    def _release(self, new_text: str) -> str:
        if not new_text:
            return ""
        text = self._pending + new_text
        found = None
        if self._num_tokens > self._min_tokens:
            # What was pending has been searched, or came too early to count.
            found = find_stop(text, self._stops, after=len(self._pending))
        if found is not None:
            start, matched = found
            self._stop = StopMatch(num_tokens=self._num_tokens, matched=matched)
            self._pending = ""
            return text[: start + len(matched)] if self._keep_stop else text[:start]
        held = _held_length(text, self._stops)
        self._pending = text[len(text) - held :]
        return text[: len(text) - held]


def stop_strings(sampling: SamplingParams) -> list[str]:
    """`sampling.stop` as a list."""
    if sampling.stop is None:
        return []
    return [sampling.stop] if isinstance(sampling.stop, str) else list(sampling.stop)


def find_stop(text: str, stops: Sequence[str], *, after: int = 0) -> tuple[int, str] | None:
    """Where the earliest stop string of `text` that ends beyond its first `after` characters
    starts, and which it is; of two at one place the one listed first."""
    starts = [text.find(stop, max(0, after + 1 - len(stop))) for stop in stops]
    found = [(start, rank) for rank, start in enumerate(starts) if start >= 0]
    if not found:
        return None
    start, rank = min(found)
    return start, stops[rank]


def _held_length(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    longest = min(len(text), max((len(stop) - 1 for stop in stops), default=0))
    for length in range(longest, 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


def trim_stop_token(
    token_ids: Sequence[int], finish: FinishReason | None, sampling: SamplingParams
) -> Sequence[int]:
    """`token_ids` without the stop token that ended them, unless `no_stop_trim`."""
    if finish is None or finish.type != "stop" or not isinstance(finish.matched, int):
        return token_ids
    return token_ids if sampling.no_stop_trim else token_ids[:-1]


def final_text(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    finish: FinishReason | None,
    sampling: SamplingParams,
    prompt_ids: Ids = (),
) -> str:
    """The whole text of a finished sequence after `prompt_ids`, cut where its stop token or
    string says: what a `Detokenizer` gives piece by piece. A sequence that is held has what is
    certain: the rest comes with the tokens that go on from it."""
    if finish is not None and finish.type == "hold":
        return Detokenizer(tokenizer, sampling, prompt_ids).feed(token_ids).text
    visible = trim_stop_token(token_ids, finish, sampling)
    if finish is not None and isinstance(finish.matched, str):
        # Which match ended it depends on the token that completed it.
        only = msgspec.structs.replace(sampling, stop=finish.matched)
        detokenizer = Detokenizer(tokenizer, only, prompt_ids)
        return detokenizer.feed(visible).text + detokenizer.finish().text
    decoder = IncrementalDecoder(
        tokenizer, skip_special_tokens=sampling.skip_special_tokens, prompt_ids=prompt_ids
    )
    return decoder.whole(visible)
