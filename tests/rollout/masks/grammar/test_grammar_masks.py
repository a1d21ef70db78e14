"""The source of masks of grammars, alone: which tokens may come, and what is whose fault."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import pytest
from llguidance import LLExecutor, LLMatcher

from engine.errors import InvalidRequest, MaskError, UnmetConstraint
from engine.protocol import Grammar, Request
from rollout.masks.base import MaskedRow, PendingMask, num_words
from rollout.masks.grammar import compile as compile_
from rollout.masks.grammar import crew
from rollout.masks.grammar.source import GrammarMasks
from rollout.masks.grammar.vocabulary import Vocabulary, llguidance_tokenizer
from tests.helpers.fake_executor import EOS_ID, VOCAB_SIZE, tokens_of
from tests.helpers.grammars import ids_in, tiny_vocabulary
from tests.helpers.replicas import make_request
from tests.helpers.tiny_tokenizer import IM_END_ID

YES = Grammar(kind="choice", source='["yes", "yet", "no"]')


def asked(rid: str, grammar: Grammar = YES, *, stop_ids: tuple[int, ...] = (EOS_ID,)) -> Request:
    request = make_request(rid, [1, 2])
    return msgspec.structs.replace(request, grammar=grammar, stop_ids=list(stop_ids))


def row(request: Request, text: str = "", number: int = 0, more: tuple[int, ...] = ()) -> MaskedRow:
    tokens = np.array([*ids_in(text), *more], np.int32)
    return MaskedRow(row=number, slot=number, request=request, output_ids=tokens)


@contextmanager
def source(
    load: Callable[[], Vocabulary] = tiny_vocabulary, num_threads: int | None = None
) -> Iterator[GrammarMasks]:
    made = GrammarMasks(load, vocab_size=VOCAB_SIZE, eos_ids=[EOS_ID], num_threads=num_threads)
    try:
        yield made
    finally:
        made.close()


def result(mask: PendingMask) -> list[int]:
    """Tokens that a mask allows."""
    until(mask.done)
    bits = mask.result()
    assert bits is not None and bits.shape == (num_words(VOCAB_SIZE),) and bits.dtype == np.uint32
    return [token for token in tokens_of(np.ascontiguousarray(bits)) if token < VOCAB_SIZE]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_what_may_come_and_where_the_end_may() -> None:
    with source() as masks:
        rows = [
            row(asked("a"), "", 0),
            row(asked("b"), "ye", 1),
            row(asked("c"), "yes", 2),
            row(asked("d", stop_ids=(EOS_ID, IM_END_ID)), "no", 3),
            row(asked("e", stop_ids=()), "no", 4),
            row(asked("f", stop_ids=()), "no", 5, more=(EOS_ID,)),
            row(asked("g", stop_ids=tuple(ids_in("s"))), "ye", 6),
        ]
        found = [result(mask) for mask in masks.ask(rows)]
    assert found[0] == sorted(ids_in("y") + ids_in("n"))
    assert found[1] == sorted(ids_in("s") + ids_in("t"))
    assert found[2] == [EOS_ID]
    assert found[3] == [IM_END_ID, EOS_ID]
    # What nothing ends is filled up with the model's own.
    assert found[4] == found[5] == [EOS_ID]
    # A stop token that the grammar would take is still the end, and comes where a text is whole.
    assert found[6] == ids_in("t")


def test_before_the_constraint_begins_all_may_come_but_the_end() -> None:
    grammar = msgspec.structs.replace(YES, after_ids=[IM_END_ID])
    with source() as masks:
        first, second = masks.ask(
            [row(asked("a", grammar), "hm", 0), row(asked("b", grammar), "hm<|im_end|>y", 1)]
        )
        assert result(first) == [token for token in range(VOCAB_SIZE) if token != EOS_ID]
        assert result(second) == ids_in("e")


def test_rows_that_go_on_repeat_and_go_back() -> None:
    request = asked("a")
    with source() as masks:
        for text, want in (
            ("", "ny"),
            ("y", "e"),
            ("y", "e"),
            ("", "ny"),
            ("ye", "st"),
            ("n", "o"),
        ):
            (mask,) = masks.ask([row(request, text)])
            assert result(mask) == sorted(ids_in(want))


def test_another_request_of_the_same_id_begins_at_its_beginning() -> None:
    with source() as masks:
        (mask,) = masks.ask([row(asked("a"), "ye")])
        result(mask)
        (mask,) = masks.ask([row(asked("a", Grammar(kind="regex", source="[0-9]")), "")])
        assert result(mask) == ids_in("0123456789")
        masks.forget("a")
        masks.forget("nobody")
        (mask,) = masks.ask([row(asked("a"), "ye")])
        assert result(mask) == sorted(ids_in("st"))


def test_output_that_is_not_of_the_grammar_is_its_own_fault() -> None:
    with source() as masks:
        bad, good = masks.ask([row(asked("a"), "yx", 0), row(asked("b"), "ye", 1)])
        assert result(good) == sorted(ids_in("st"))
        with pytest.raises(UnmetConstraint, match="output tokens") as caught:
            result(bad)
        assert caught.value.field == "grammar"
        # It is looked at anew the next time.
        (mask,) = masks.ask([row(asked("a"), "y")])
        assert result(mask) == ids_in("e")


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_panic_is_the_end_of_the_request_that_caused_it(
    monkeypatch: pytest.MonkeyPatch, num_threads: int
) -> None:
    consume = crew.consume_token_par
    bad = ids_in("n")[0]

    def panicking(executor: LLExecutor, pairs: list[tuple[LLMatcher, int]]) -> list[bool]:
        done = consume(executor, pairs)
        if bad in (token for _, token in pairs):
            # A token longer than llguidance's tree is deep: a panic of its own.
            llguidance_tokenizer(Vocabulary([b"x" * 70_000], []))
        return done

    monkeypatch.setattr(crew, "consume_token_par", panicking)
    with source(num_threads=num_threads) as masks:
        for _ in range(2):
            rows = [row(asked(rid), text, n) for n, (rid, text) in enumerate(BESIDE)]
            first, broken, last = masks.ask(rows)
            assert result(first) == ids_in("e")
            assert result(last) == sorted(ids_in("st"))
            with pytest.raises(UnmetConstraint, match="llguidance failed") as caught:
                result(broken)
            assert caught.value.field == "grammar"


BESIDE = (("a", "y"), ("b", "n"), ("c", "ye"))
"""The second is the one in which something panics."""


@pytest.mark.parametrize("broken", ["vocabulary", "compilation"])
def test_a_panic_before_the_first_mask(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def panicking(*args: Any, **options: Any) -> LLMatcher:
        llguidance_tokenizer(Vocabulary([b"x" * 70_000], []))
        raise AssertionError("it did not panic")

    if broken == "compilation":
        monkeypatch.setattr(compile_, "LLMatcher", panicking)
        load = tiny_vocabulary
    else:

        def load() -> Vocabulary:
            return Vocabulary([b"x" * 70_000], [])

    with source(load) as masks:
        (mask,) = masks.ask([row(asked("a"))])
        with pytest.raises((InvalidRequest, MaskError), match="num_parents"):
            result(mask)


def test_a_grammar_that_cannot_be_compiled_ends_its_request_alone() -> None:
    broken = asked("a", Grammar(kind="regex", source="("))
    with source() as masks:
        bad, good = masks.ask([row(broken, "", 0), row(asked("b"), "", 1)])
        assert result(good)
        with pytest.raises(InvalidRequest, match="position 0"):
            result(bad)
        until(lambda: masks.prepare(broken))


def test_a_failure_that_is_told_again_gathers_nothing() -> None:
    """An error kept and raised again would hold the frames of all who met it."""
    told = []
    with source() as masks:
        for number in range(3):
            (mask,) = masks.ask([row(asked(f"{number}", Grammar(kind="regex", source="(")))])
            until(mask.done)
            with pytest.raises(InvalidRequest) as caught:
                mask.result()
            told.append(caught.value)
    assert len({id(error) for error in told}) == 3
    assert len({str(error) for error in told}) == 1


def test_a_model_without_a_tokenizer_is_named() -> None:
    from rollout.masks.grammar.vocabulary import load_vocabulary

    with source(lambda: load_vocabulary("/nowhere", VOCAB_SIZE)) as masks:
        (mask,) = masks.ask([row(asked("a"))])
        with pytest.raises(InvalidRequest, match="tokenizer"):
            result(mask)


def test_nothing_is_loaded_before_the_first_grammar_and_then_once() -> None:
    loads: list[int] = []
    gate = threading.Event()

    def load() -> Vocabulary:
        loads.append(1)
        gate.wait(60)
        return tiny_vocabulary()

    with source(load) as masks:
        assert masks.prepare(make_request("p", [1])) and not loads
        first, second = asked("a"), asked("b", Grammar(kind="regex", source="x"))
        assert not masks.prepare(first) and not masks.prepare(second)
        pending = masks.ask([row(first, "", 0), row(second, "", 1)])
        assert not pending[0].done() and not pending[1].done()
        gate.set()
        assert result(pending[0]) and result(pending[1]) == ids_in("x")
        assert masks.prepare(first) and len(loads) == 1


def test_grammars_are_dropped_when_there_are_many_and_made_again() -> None:
    with source() as masks:
        for number in range(300):
            request = asked(f"r{number}", Grammar(kind="regex", source=f"{number}"))
            until(lambda request=request: masks.prepare(request))
        assert len(masks._compiled._found) <= 256
        (mask,) = masks.ask([row(asked("x", Grammar(kind="regex", source="0")))])
        assert result(mask) == ids_in("0")


def test_ids_that_no_token_has_never_come() -> None:
    """A model may have more logits than its tokenizer has tokens."""
    wide = VOCAB_SIZE + 20

    def load() -> Vocabulary:
        tiny = tiny_vocabulary()
        return Vocabulary([*tiny.tokens, *[b""] * 20], tiny.special_ids)

    made = GrammarMasks(load, vocab_size=wide, eos_ids=[EOS_ID])
    try:
        (mask,) = made.ask([row(asked("a", Grammar(kind="regex", source="(?s:.)*")))])
        until(mask.done)
        bits: Any = mask.result()
        assert len(bits) == num_words(wide)
        found = tokens_of(np.ascontiguousarray(bits))
        assert max(token for token in found if token < wide) == EOS_ID
    finally:
        made.close()


def test_which_tokens_a_text_is_cut_into_is_left_to_the_model() -> None:
    """Also where only one text may come."""
    tokens = [b"t", b"te", b"test", b"st", b"s", b"x", b"<end>"]
    load = lambda: Vocabulary(tokens, [6])  # noqa: E731
    made = GrammarMasks(load, vocab_size=len(tokens), eos_ids=[6])
    try:
        for output, want in (([], [0, 1, 2]), ([1], [3, 4]), ([2], [6])):
            request = asked("a", Grammar(kind="regex", source="test"), stop_ids=(6,))
            taken = np.array(output, np.int32)
            (mask,) = made.ask([MaskedRow(row=0, slot=0, request=request, output_ids=taken)])
            until(mask.done)
            bits = mask.result()
            assert bits is not None
            found = tokens_of(np.ascontiguousarray(bits))
            assert [token for token in found if token < len(tokens)] == want
    finally:
        made.close()


def test_many_rows_of_a_grammar_are_spread_over_threads_and_get_the_same_masks() -> None:
    """Rows come, go on, go back and end while the grammar is compiled again beside them."""
    texts = ("", "y", "ye", "n", "yes")
    requests = [asked(f"r{number}") for number in range(24)]
    with source(num_threads=3) as masks:
        for step in range(40):
            rows = [
                row(request, texts[(number + step) % len(texts)], number)
                for number, request in enumerate(requests)
                if (number + step) % 7
            ]
            found = [result(mask) for mask in masks.ask(rows)]
            for one, allowed in zip(rows, found, strict=True):
                text = "".join(texts[(one.row + step) % len(texts)])
                want = {"": "ny", "y": "e", "ye": "st", "n": "o"}.get(text)
                assert allowed == ([EOS_ID] if want is None else sorted(ids_in(want)))
            (compiled,) = masks._compiled._found.values()
            until(lambda compiled=compiled: all(one.done() for one in compiled.more))
        starts = compiled.starts()
        assert len(starts) == 6 and len({start.serial for start in starts}) == 6
        counts = [start.num_rows for start in starts]
        assert sum(counts) == 24 and max(counts) <= 6
        for request in requests:
            masks.forget(request.rid)
        (mask,) = masks.ask([row(asked("last"))])
        result(mask)
        assert sum(start.num_rows for start in starts) == 1


def test_rows_whose_tokens_do_not_fit_are_told_apart_from_their_neighbours_on_other_threads() -> (
    None
):
    requests = [asked(f"r{number}") for number in range(12)]
    with source(num_threads=4) as masks:
        for text in ("", "y", "ye"):
            rows = [row(request, text, number) for number, request in enumerate(requests)]
            [result(mask) for mask in masks.ask(rows)]
            (compiled,) = masks._compiled._found.values()
            until(lambda compiled=compiled: all(one.done() for one in compiled.more))
        rows = [
            row(request, "yex" if number in (3, 8) else "yes", number)
            for number, request in enumerate(requests)
        ]
        for number, mask in enumerate(masks.ask(rows)):
            if number in (3, 8):
                with pytest.raises(UnmetConstraint, match="output tokens"):
                    result(mask)
            else:
                assert result(mask) == [EOS_ID]
