"""Ids to text while they arrive, and stop strings found in that text.

Two things make this more than `decode`: a character may need several tokens, and a stop
string may lie across tokens. Neither half a character nor the beginning of a stop string
ever leaves here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.protocol import FinishReason, SamplingParams
from rollout.text.tokenizer import Tokenizer

_BROKEN = "\ufffd"
_MAX_HELD_TOKENS = 16


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


class IncrementalDecoder:
    """Text of a growing list of ids, a token at a time.

    The offset technique of text-generation-inference, which vLLM uses too: decode a short
    window twice, with and without the new tokens, so that rules which look at neighbours
    (leading spaces, byte fallback) see them; the difference is new text. Text that ends in
    U+FFFD waits for the rest of its character, at most `_MAX_HELD_TOKENS` tokens: then the
    bytes are broken for good.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._num_read = 0

    def add(self, token_id: int) -> str:
        """Text that `token_id` completes; empty while a character is unfinished."""
        self._window.append(token_id)
        before, after = self._decode(self._window[: self._num_read]), self._decode(self._window)
        held = len(self._window) - self._num_read
        if len(after) <= len(before) and held <= _MAX_HELD_TOKENS:
            return ""
        if after.endswith(_BROKEN) and held <= _MAX_HELD_TOKENS:
            return ""
        self._window = self._window[self._num_read :]
        self._num_read = len(self._window)
        return after[len(before) :]

    def flush(self) -> str:
        """What is still held back, broken characters as U+FFFD."""
        before, after = self._decode(self._window[: self._num_read]), self._decode(self._window)
        self._num_read = len(self._window)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


class Detokenizer:
    """One sequence's text, cut at its first stop string.

    After a match, more tokens are ignored: the engine may have sampled some before it
    heard of the stop.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams) -> None:
        self._decoder = IncrementalDecoder(
            tokenizer, skip_special_tokens=sampling.skip_special_tokens
        )
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
        found = find_stop(text, self._stops)
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


def find_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where the earliest stop string of `text` starts, and which it is; of two at one
    place the one listed first."""
    found = [(text.find(stop), rank, stop) for rank, stop in enumerate(stops) if stop in text]
    if not found:
        return None
    start, _, stop = min(found)
    return start, stop


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
) -> str:
    """The whole text of a finished sequence, cut where its stop token or string says."""
    visible = trim_stop_token(token_ids, finish, sampling)
    text = tokenizer.decode(visible, skip_special_tokens=sampling.skip_special_tokens)
    if finish is None or not isinstance(finish.matched, str):
        return text
    start = text.find(finish.matched)
    if start < 0:
        return text
    return text[: start + len(finish.matched)] if sampling.no_stop_trim else text[:start]
