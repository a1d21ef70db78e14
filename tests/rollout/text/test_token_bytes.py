"""The bytes of tokens, and texts and places made from them, for every kind of tokenizer."""

from __future__ import annotations

import codecs
import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from engine.errors import ModelError
from engine.protocol import SamplingParams
from rollout.text.detokenizer import Detokenizer, IncrementalDecoder, final_text
from rollout.text.special_tokens import SpecialTokens
from rollout.text.token_bytes import spelled
from rollout.text.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.tiny_tokenizer import tiny_tokenizer
from tests.helpers.token_families import FAMILIES, byte_level, sentencepiece

BUILT = {name: build() for name, build in FAMILIES.items()}
family = pytest.mark.parametrize("name", sorted(FAMILIES))

# Emoji with joiners and flags, combining marks, CJK, right to left, controls, what is one token.
HARD = "aabis é \u0301\u20e3👩‍👩‍👧🎉🇩🇪你好日本한العربية\ufffd\x00\n ▁.<think><思><à><|end|>Paris"
texts = st.lists(st.sampled_from(list(HARD)) | st.characters(codec="utf-8"), max_size=30).map(
    "".join
) | st.sampled_from(["Paris is", " Paris is", "  a", "<|end|> a", "e\u0301", "👨‍👩‍👧‍👦!"])


def placed(tokenizer: Tokenizer, ids: list[int], *, skip: bool = False, prompt: list[int] = ()):
    """Every token of `ids` at its place, and their whole text."""
    decoder = IncrementalDecoder(tokenizer, skip_special_tokens=skip, prompt_ids=prompt)
    found = [decoder.place(token) for token in ids]
    return found, "".join(piece.text for piece in found) + decoder.flush()


def chars_of(raw: bytes) -> list[int]:
    """For every byte, the character of the text that it belongs to: the specification of
    offsets. Found from what Python's decoder says of every broken part."""
    broken: list[tuple[int, int]] = []

    def note(error: UnicodeDecodeError) -> tuple[str, int]:
        broken.append((error.start, error.end))
        return "\ufffd", error.end

    codecs.register_error("note_broken_parts", note)
    raw.decode("utf-8", "note_broken_parts")
    found: list[int] = []
    position = number = 0
    for start, end in [*broken, (len(raw), len(raw))]:
        for char in raw[position:start].decode():
            found += [number] * len(char.encode())
            number += 1
        found += [number] * (end - start)
        position, number = end, number + 1
    return found


@family
@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_bytes_of_all_tokens_are_those_of_the_text(name: str, text: str) -> None:
    tokenizer = BUILT[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    found, shown = placed(tokenizer, ids)
    assert b"".join(piece.raw for piece in found) == shown.encode()
    assert shown == tokenizer.decode(ids, skip_special_tokens=False)
    if name.startswith(("byte", "sentence")) and "▁" not in text:
        assert shown == text


@family
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_ids_have_offsets_that_slice_their_text(name: str, data: st.DataObject) -> None:
    tokenizer = BUILT[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=30))
    skip = data.draw(st.booleans())
    prompt = data.draw(st.sampled_from([[], [5, 6]]))
    found, text = placed(tokenizer, ids, skip=skip, prompt=prompt)
    shown = [
        piece
        for token, piece in zip(ids, found, strict=True)
        if tokenizer.is_shown(token, skip_special_tokens=skip)
    ]
    raw = b"".join(piece.raw for piece in shown)
    assert text == raw.decode(errors="replace")
    chars, position = [*chars_of(raw), len(text)], 0
    for piece in shown:
        # A token without bytes has the end of what is known by then.
        assert not piece.raw or piece.offset == chars[position]
        position += len(piece.raw)
    offsets = [*(piece.offset for piece in shown), len(text)]
    assert offsets == sorted(offsets)
    slices = [text[a:b] for a, b in itertools.pairwise(offsets)]
    assert "".join(slices) == text


@family
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_stream_the_whole_and_the_final_text_are_one(name: str, data: st.DataObject) -> None:
    tokenizer = BUILT[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    prompt = data.draw(st.sampled_from([(), (5, 6)]))
    sampling = SamplingParams(skip_special_tokens=data.draw(st.booleans()))
    detokenizer = Detokenizer(tokenizer, sampling, prompt)
    pieces = [detokenizer.feed([token]).text for token in ids]
    streamed = "".join(pieces) + detokenizer.finish().text
    assert streamed == final_text(tokenizer, ids, None, sampling, prompt)
    _, text = placed(tokenizer, ids, skip=sampling.skip_special_tokens, prompt=list(prompt))
    assert streamed == text


@given(st.lists(st.integers(0, 299), max_size=60), st.booleans())
def test_broken_characters_come_out_as_the_tokenizers_library_has_them(
    ids: list[int], skip: bool
) -> None:
    tokenizer = tiny_tokenizer()
    found = IncrementalDecoder(tokenizer, skip_special_tokens=skip).whole(ids)
    assert found == tokenizer.decode(ids, skip_special_tokens=skip)


def test_every_pair_and_triple_of_bytes_is_broken_where_it_breaks() -> None:
    """All leads and the bounds of what may follow them, a byte a token."""
    tokenizer = sentencepiece()
    bounds = [0x41, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF]
    leads = [0xC0, 0xC2, 0xE0, 0xE1, 0xED, 0xEF, 0xF0, 0xF1, 0xF4, 0xF5]
    for values in itertools.product([*leads, 0x41], [*bounds, 0xC2], bounds, [0x80, 0x41]):
        found, text = placed(tokenizer, [3 + value for value in values])
        assert text == bytes(values).decode(errors="replace")
        assert [piece.offset for piece in found] == chars_of(bytes(values)), values
        # Only what may still become a character is held.
        shown = 0
        for size, piece in enumerate(found, start=1):
            shown += len(piece.text)
            held = len(bytes(values[:size]).decode(errors="replace")) - shown
            assert held in (0, 1), values


def test_parts_of_a_character_are_their_own_bytes() -> None:
    for tokenizer in (byte_level(), sentencepiece()):
        ids = tokenizer.encode("a🎉é", add_special_tokens=False)
        found, text = placed(tokenizer, ids)
        assert text == "a🎉é"
        parts = [piece.raw for piece in found if piece.offset == 1]
        assert len(parts) > 1
        assert b"".join(parts) == "🎉".encode()
        assert len({spelled(piece.raw) for piece in found}) == len(found)


def test_a_word_keeps_its_space_after_a_prompt_and_not_at_the_beginning() -> None:
    tokenizer = sentencepiece()
    prompt, answer = tokenizer.encode("a"), tokenizer.encode("Paris is")
    plain = SamplingParams()
    assert final_text(tokenizer, answer, None, plain, prompt) == " Paris is"
    assert final_text(tokenizer, answer, None, plain) == "Paris is"
    found, _ = placed(tokenizer, answer, prompt=prompt)
    assert b"".join(piece.raw for piece in found) == b" Paris is"
    # A prompt without text leaves the answer at the beginning; a special token that is shown
    # is text.
    bos = [tokenizer.bos_id or 0]
    assert final_text(tokenizer, answer, None, plain, bos) == "Paris is"
    shown = SamplingParams(skip_special_tokens=False)
    assert final_text(tokenizer, answer, None, shown, bos) == " Paris is"


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b" a", " a"),
        (b"", ""),
        ("\ufffd".encode(), "\ufffd"),
        (b"\xf0\x9f", "bytes:\\xf0\\x9f"),
        (b"token_id:7", "bytes:\\x74\\x6f\\x6b\\x65\\x6e\\x5f\\x69\\x64\\x3a\\x37"),
        (b"bytes:\\xf0", "bytes:" + "".join(f"\\x{b:02x}" for b in b"bytes:\\xf0")),
        (b"bytes: a", "bytes: a"),
    ],
)
def test_spelling(raw: bytes, text: str) -> None:
    assert spelled(raw) == text


@given(st.binary(max_size=6) | st.sampled_from([b"\xf0", b"bytes:\\xf0", b"token_id:1"]))
def test_the_spelling_says_the_bytes(raw: bytes) -> None:
    text = spelled(raw)
    if text.startswith("bytes:\\x"):
        assert bytes.fromhex(text.removeprefix("bytes:").replace("\\x", "")) == raw
    else:
        assert text.encode() == raw


def test_a_decoder_without_bytes_of_tokens_is_refused_by_name() -> None:
    backend = byte_level()._backend
    backend.decoder = decoders.CTC()
    with pytest.raises(ModelError, match="CTC") as caught:
        Tokenizer(backend, SpecialTokens())
    assert caught.value.field == "decoder"


@pytest.mark.slow
def test_every_token_of_the_default_model(default_model: str) -> None:
    tokenizer = load_tokenizer(Path(default_model))
    for token in range(tokenizer.vocab_size):
        raw = tokenizer.token_bytes(token)
        shown = tokenizer.decode([token], skip_special_tokens=False)
        assert raw.decode(errors="replace") == shown, token
    ids = tokenizer.encode(HARD)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == HARD
