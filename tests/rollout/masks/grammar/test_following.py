"""Where an output stands in its grammar: tokens that come one by one, several at once, again, and
go; the begin behind a thinking block; and the end."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.protocol import Grammar, IntArray
from rollout.masks.grammar.following import Following
from rollout.masks.grammar.starts import Start
from tests.helpers.fake_executor import EOS_ID
from tests.helpers.grammars import compiled, ids_in
from tests.helpers.replicas import make_request

TEXT = ids_in('[12,"a",3]')
LIST = Grammar(kind="json_schema", source='{"type": "array", "maxItems": 5}')


def following(grammar: Grammar = LIST) -> Following:
    request = msgspec.structs.replace(make_request("a", [1]), grammar=grammar)
    return Following(request, Start(matcher=compiled(grammar)), (EOS_ID,))


def array(tokens: list[int]) -> IntArray:
    return np.array(tokens, np.int32)


def state(one: Following) -> tuple[Any, ...]:
    """What its mask depends on."""
    return one.begun, one.over, bytes(one.matcher.compute_bitmask())


def moved(one: Following, tokens: list[int]) -> None:
    fed = one.move(array(tokens))
    assert not fed or one.matcher.consume_tokens(fed)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, len(TEXT)), min_size=1, max_size=6), st.booleans())
def test_any_order_of_lengths_is_as_if_it_had_come_at_once(
    lengths: list[int], thinks: bool
) -> None:
    after = [50, 51] if thinks else []
    grammar = msgspec.structs.replace(LIST, after_ids=after)
    output = ([9, 50, 50, 51] if thinks else []) + TEXT
    one = following(grammar)
    for length in lengths:
        at = length + (4 if thinks and length else 0)
        moved(one, output[:at])
        fresh = following(grammar)
        moved(fresh, output[:at])
        assert state(one) == state(fresh)


def test_another_output_of_the_same_length_is_followed_from_where_they_differ() -> None:
    one, fresh = following(), following()
    moved(one, ids_in('[12,"a'))
    moved(one, ids_in("[13,tru"))
    moved(fresh, ids_in("[13,tru"))
    assert state(one) == state(fresh)


def test_the_constraint_begins_behind_the_first_occurrence() -> None:
    one = following(msgspec.structs.replace(LIST, after_ids=[7, 8]))
    for output in ([], [7], [7, 7], [8, 7]):
        assert one.move(array(output)) == [] and not one.begun
    assert one.move(array([7, 7, 8])) == [] and one.begun
    assert one.move(array([7, 7, 8, *TEXT[:2], 7])) == [*TEXT[:2], 7]
    # Gone back into the block, it has not begun.
    assert one.move(array([7, 7])) == [] and not one.begun


def test_an_ending_token_is_not_fed_and_ends_the_constraint() -> None:
    one = following()
    assert one.move(array([*TEXT, EOS_ID, EOS_ID])) == TEXT
    assert one.over
    assert one.move(array([*TEXT, EOS_ID, EOS_ID, EOS_ID])) == []
    assert one.matcher.consume_tokens(TEXT)
    assert one.move(array(TEXT)) == [] and not one.over
    assert one.move(array(TEXT[:3])) == []
    fresh = following()
    moved(fresh, TEXT[:3])
    assert state(one) == state(fresh)


def test_a_matcher_that_cannot_go_back_begins_anew() -> None:
    grammar = Grammar(kind="lark", source="start: a\na[max_tokens=9]: /[a-z]+/")
    one, fresh = following(grammar), following(grammar)
    moved(one, ids_in("abcd"))
    moved(one, ids_in("ab"))
    moved(fresh, ids_in("ab"))
    assert state(one) == state(fresh)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, len(TEXT)), st.integers(0, len(TEXT)), st.booleans())
def test_a_row_that_joins_another_start_goes_on_where_it_was(
    length: int, later: int, thinks: bool
) -> None:
    before = [9, 50, 51] if thinks else []
    grammar = msgspec.structs.replace(LIST, after_ids=[50, 51] if thinks else [])
    one, fresh = following(grammar), following(grammar)
    moved(one, before + TEXT[:length])
    left, other = one.start, Start(matcher=compiled(grammar), serial=1)
    one.join(other)
    assert (left.num_rows, other.num_rows) == (0, 1)
    moved(fresh, before + TEXT[:length])
    assert state(one) == state(fresh)
    moved(one, before + TEXT[:later])
    moved(fresh, before + TEXT[:later])
    assert state(one) == state(fresh)
