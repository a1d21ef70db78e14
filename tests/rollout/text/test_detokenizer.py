"""From token ids to text, piece by piece: whole characters, and stop strings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol import FinishReason, SamplingParams
from rollout.text.detokenizer import (
    Detokenizer,
    IncrementalDecoder,
    StopMatch,
    final_text,
    find_stop,
    trim_stop_token,
)
from tests.helpers.tiny_tokenizer import EOS_ID, IM_END_ID, ids_of, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def feed_each(ids: list[int], **sampling: object) -> tuple[list[str], StopMatch | None]:
    """Texts of one-token feeds and of finish, and the stop."""
    detokenizer = Detokenizer(TOKENIZER, SamplingParams(**sampling))
    deltas = [detokenizer.feed([token]) for token in ids]
    last = detokenizer.finish()
    return [*(d.text for d in deltas), last.text], last.stop


@given(st.text(max_size=40))
def test_texts_join_to_the_whole_and_hold_no_half_character(text: str) -> None:
    texts, stop = feed_each(TOKENIZER.encode(text, add_special_tokens=False))
    assert "".join(texts) == TOKENIZER.decode(TOKENIZER.encode(text))
    assert stop is None
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in texts)


def test_an_emoji_comes_with_its_last_byte() -> None:
    texts, _ = feed_each(TOKENIZER.encode("a🎉b"))
    assert texts == ["a", "", "", "", "🎉", "b", ""]


def test_unfinished_character_comes_at_the_end_as_replacement() -> None:
    texts, _ = feed_each(TOKENIZER.encode("a🎉")[:-1])
    assert texts == ["a", "", "", "", "\ufffd"]


def test_broken_bytes_are_not_held_for_ever() -> None:
    lone = TOKENIZER.encode("é")[1]
    decoder = IncrementalDecoder(TOKENIZER, skip_special_tokens=True)
    texts = [decoder.add(lone) for _ in range(40)]
    assert any(texts)
    assert "".join(texts) + decoder.flush() == "\ufffd" * 40


@given(st.lists(st.integers(0, 299), max_size=60))
def test_any_ids_give_the_text_of_a_plain_decode(ids: list[int]) -> None:
    texts, _ = feed_each(ids)
    assert "".join(texts) == TOKENIZER.decode(ids)


def test_special_tokens_are_skipped_or_shown() -> None:
    ids = [*ids_of("a"), IM_END_ID, *ids_of("b")]
    assert "".join(feed_each(ids)[0]) == "ab"
    assert "".join(feed_each(ids, skip_special_tokens=False)[0]) == "a<|im_end|>b"


def test_stop_across_tokens_is_found_and_trimmed() -> None:
    texts, stop = feed_each(ids_of("abcENDxyz"), stop=["END"])
    assert stop == StopMatch(num_tokens=6, matched="END")
    assert "".join(texts) == "abc"


def test_stop_is_kept_on_request() -> None:
    texts, stop = feed_each(ids_of("abcENDxyz"), stop="END", no_stop_trim=True)
    assert stop is not None
    assert "".join(texts) == "abcEND"


def test_beginning_of_a_stop_is_held_until_it_is_not_one() -> None:
    texts, stop = feed_each(ids_of("aENx"), stop=["END"])
    assert texts == ["a", "", "", "ENx", ""]
    assert stop is None


def test_beginning_of_a_stop_at_the_end_is_text() -> None:
    texts, stop = feed_each(ids_of("aEN"), stop=["END"])
    assert texts == ["a", "", "", "EN"]
    assert stop is None


def test_held_text_restarts_inside_itself() -> None:
    texts, stop = feed_each(ids_of("aaab"), stop=["aab"])
    assert stop == StopMatch(num_tokens=4, matched="aab")
    assert "".join(texts) == "a"


@given(st.text(alphabet="ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4)))
def test_stops_agree_with_a_search_of_every_prefix(text: str, stops: list[str]) -> None:
    texts, stop = feed_each(ids_of(text), stop=stops)
    ends = [n for n in range(1, len(text) + 1) if find_stop(text[:n], stops)]
    if not ends:
        assert stop is None
        assert "".join(texts) == text
        return
    assert stop is not None
    assert stop.num_tokens == ends[0]
    start, matched = find_stop(text[: ends[0]], stops) or (0, "")
    assert (stop.matched, "".join(texts)) == (matched, text[:start])


@given(
    st.text(alphabet="ab", max_size=14),
    st.lists(st.text("ab", min_size=1, max_size=4)),
    st.integers(0, 14),
    st.booleans(),
)
def test_stops_that_the_minimum_allows_agree_with_a_search(
    text: str, stops: list[str], minimum: int, kept: bool
) -> None:
    """A token a character: the sequence ends at the first token beyond the minimum that
    completes a stop string, at the earliest and first listed of those it completes."""
    sampling = SamplingParams(stop=stops, min_new_tokens=minimum, no_stop_trim=kept)
    detokenizer = Detokenizer(TOKENIZER, sampling)
    streamed = "".join(detokenizer.feed([token]).text for token in ids_of(text))
    last = detokenizer.finish()
    ends = [
        (end, end - len(stop), rank, stop)
        for rank, stop in enumerate(stops)
        for end in range(minimum + 1, len(text) + 1)
        if text[:end].endswith(stop)
    ]
    shown, finish = text, FinishReason(type="length", length=len(text))
    if ends:
        end, start, _, matched = min(ends)
        assert last.stop == StopMatch(num_tokens=end, matched=matched)
        shown = text[: end if kept else start]
        finish = FinishReason(type="stop", matched=matched)
        text = text[:end]
    else:
        assert last.stop is None
    assert streamed + last.text == shown
    assert final_text(TOKENIZER, ids_of(text), finish, sampling) == shown


def test_one_feed_of_many_tokens_stops_at_the_right_one() -> None:
    delta = Detokenizer(TOKENIZER, SamplingParams(stop=["b"])).feed(ids_of("aab"))
    assert delta.text == "aa"
    assert delta.stop == StopMatch(num_tokens=3, matched="b")


def test_tokens_after_a_match_are_ignored() -> None:
    detokenizer = Detokenizer(TOKENIZER, SamplingParams(stop=["b"]))
    detokenizer.feed(ids_of("ab"))
    delta = detokenizer.feed(ids_of("zzz"))
    assert delta.text == ""
    assert delta.stop == StopMatch(num_tokens=2, matched="b")


def test_earliest_match_wins_then_the_first_listed() -> None:
    assert find_stop("xaby", ["b", "ab"]) == (1, "ab")
    assert find_stop("xaby", ["a", "ab"]) == (1, "a")
    assert find_stop("x", ["a"]) is None


@pytest.mark.parametrize(
    ("finish", "no_stop_trim", "kept"),
    [
        (FinishReason(type="stop", matched=EOS_ID), False, 1),
        (FinishReason(type="stop", matched=EOS_ID), True, 2),
        (FinishReason(type="stop", matched="x"), False, 2),
        (FinishReason(type="length", length=2), False, 2),
        (None, False, 2),
    ],
)
def test_stop_token_is_trimmed(finish: FinishReason | None, no_stop_trim: bool, kept: int) -> None:
    sampling = SamplingParams(no_stop_trim=no_stop_trim)
    assert len(trim_stop_token([1, EOS_ID], finish, sampling)) == kept


def test_final_text_cuts_at_the_matched_string() -> None:
    finish = FinishReason(type="stop", matched="E")
    ids = ids_of("abEx")
    assert final_text(TOKENIZER, ids, finish, SamplingParams()) == "ab"
    assert final_text(TOKENIZER, ids, finish, SamplingParams(no_stop_trim=True)) == "abE"


def test_final_text_without_its_stop_token() -> None:
    ids = [*ids_of("ab"), IM_END_ID]
    finish = FinishReason(type="stop", matched=IM_END_ID)
    shown = SamplingParams(skip_special_tokens=False)
    assert final_text(TOKENIZER, ids, finish, shown) == "ab"
    kept = SamplingParams(skip_special_tokens=False, no_stop_trim=True)
    assert final_text(TOKENIZER, ids, finish, kept) == "ab<|im_end|>"
