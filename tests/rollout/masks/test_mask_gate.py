"""The gate of a step that waits for masks: what it waits for, and whom a failure ends."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidRequest, MaskError, MaskTimeout
from engine.protocol import FinishReason, Request, RequestOutput
from engine.protocol.deadlines import MASK_S
from rollout.masks.allowed import AllowedTokens
from rollout.masks.base import KnownMask, MaskedRow, MaskOf, bits_of, num_words
from rollout.masks.gate import Answer, MaskGate
from tests.helpers.fake_executor import tokens_of
from tests.helpers.mask_sources import NEVER, Broken, CountedMasks, ScriptedSource
from tests.helpers.replicas import make_request

VOCAB = 70
TIMEOUT_S = 2.0


class Clock:
    """Seconds that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def asked_of(rid: str, allowed: Sequence[int] | None = None, **sampling: Any) -> Request:
    ids = None if allowed is None else np.array(allowed, np.int32)
    return msgspec.structs.replace(make_request(rid, [1, 2], **sampling), allowed_token_ids=ids)


def rows_of(*requests: Request, num_outputs: int = 0) -> list[MaskedRow]:
    outputs = np.zeros(num_outputs, np.int32)
    return [
        MaskedRow(row=2 * row, slot=row, request=request, output_ids=outputs)
        for row, request in enumerate(requests)
    ]


class Gate:
    """A gate over scripted sources, on a clock of its own."""

    def __init__(self, *sources: Any, timeout_s: float = TIMEOUT_S) -> None:
        self.clock = Clock()
        self.gate = MaskGate(sources, vocab_size=VOCAB, timeout_s=timeout_s, clock=self.clock)
        self.ended: set[str] = set()

    def look(self) -> Answer:
        return self.gate.look(lambda row: row.request.rid not in self.ended)


def over(rid: str) -> RequestOutput:
    """The last output of a request."""
    finish, nothing = FinishReason(type="length", length=1), np.empty(0, np.int32)
    return RequestOutput(rid=rid, start=0, token_ids=nothing, logprobs=nothing, finish=finish)


def scripted(rule: Any, prefix: str = "m") -> ScriptedSource:
    return ScriptedSource(rule, prefix=prefix, vocab_size=VOCAB)


def found(answer: Answer) -> dict[int, list[int]]:
    """The frame: tokens by row."""
    assert answer.masks is not None
    masks = answer.masks
    found = {}
    for row, mask in zip(masks.rows, masks.masks, strict=True):
        assert mask.bits is not None and mask.bits.shape == (num_words(VOCAB),)
        assert mask.bits.dtype == np.uint32
        found[row] = tokens_of(mask.bits)
    return found


def test_masks_that_are_there_are_given_at_the_first_look() -> None:
    gate = Gate(AllowedTokens(VOCAB))
    gate.gate.open(rows_of(asked_of("a", [5, 69, 5]), asked_of("b", [0])))
    assert gate.gate.pause_s == 0.0
    answer = gate.look()
    assert found(answer) == {0: [5, 69], 2: [0]}
    assert answer.masks is not None and answer.masks.courses == []
    assert answer.failed == []
    gate.gate.open([])  # The step before waits no more.


def test_a_request_is_packed_once_and_another_of_its_id_anew() -> None:
    source = AllowedTokens(VOCAB)
    first, second = asked_of("a", [5]), asked_of("a", [6])
    (mask,) = source.ask(rows_of(first))
    (again,) = source.ask(rows_of(first))
    assert again.result() is mask.result()
    (other,) = source.ask(rows_of(second))
    assert tokens_of(other.result()) == [6]
    source.forget("a")
    source.forget("nobody")
    (anew,) = source.ask(rows_of(second))
    assert anew.result() is not other.result()


def test_a_row_gets_what_all_its_sources_allow() -> None:
    gate = Gate(AllowedTokens(VOCAB), scripted(lambda rid, outputs: (0, [6, 7, 8])))
    gate.gate.open(rows_of(asked_of("m", [7, 8, 9]), asked_of("a", [1])))
    assert found(gate.look()) == {0: [7, 8], 2: [1]}


def test_a_source_may_have_nothing_against_any_token() -> None:
    gate = Gate(AllowedTokens(VOCAB), scripted(lambda rid, outputs: (0, None)))
    gate.gate.open(rows_of(asked_of("m1", [7]), asked_of("m2")))
    assert found(gate.look()) == {0: [7]}


def test_what_is_late_is_waited_for_longer_and_longer() -> None:
    gate = Gate(scripted(lambda rid, outputs: (20, [3])))
    gate.gate.open(rows_of(asked_of("m")))
    pauses = []
    while (answer := gate.look()).masks is None:
        assert answer.failed == []
        pauses.append(gate.gate.pause_s)
        gate.clock.now += 0.001
    assert len(pauses) == 20
    assert pauses[0] == 0.0 and pauses == sorted(pauses) and pauses[-1] <= 0.001
    assert pauses[1] < pauses[5] < pauses[-1]
    assert found(answer) == {0: [3]}


def test_at_the_deadline_each_late_request_ends_alone() -> None:
    def rule(rid: str, outputs: list[int]) -> tuple[int, list[int]]:
        return {"m1": 0, "m2": NEVER, "m3": 1}[rid], [4]

    gate = Gate(scripted(rule))
    gate.gate.open(rows_of(asked_of("m1"), asked_of("m2"), asked_of("m3")))
    for _ in range(3):
        assert gate.look() == Answer(masks=None)
        gate.clock.now += TIMEOUT_S / 3.01
    gate.clock.now += 0.1
    answer = gate.look()
    assert found(answer) == {0: [4], 4: [4]}
    ((rid, error),) = answer.failed
    assert rid == "m2" and type(error) is MaskTimeout and "2 s" in error.message


def test_no_configuration_waits_longer_than_a_step_may() -> None:
    gate = Gate(scripted(lambda rid, outputs: (NEVER, [4])), timeout_s=1e9)
    gate.gate.open(rows_of(asked_of("m")))
    gate.clock.now += MASK_S - 0.1
    assert gate.look().masks is None
    gate.clock.now += 0.2
    assert [type(error) for _, error in gate.look().failed] == [MaskTimeout]


def test_nothing_is_waited_for_on_behalf_of_who_has_ended() -> None:
    gate = Gate(scripted(lambda rid, outputs: (NEVER, [4])))
    gate.gate.open(rows_of(asked_of("m1"), asked_of("m2")))
    assert gate.look().masks is None
    gate.ended = {"m1", "m2"}
    answer = gate.look()
    assert found(answer) == {} and answer.failed == []


def test_an_error_of_ours_stays_what_it_is_and_any_other_is_told() -> None:
    def rule(rid: str, outputs: list[int]) -> tuple[int, Any]:
        wrong = {"m1": InvalidRequest("no such rule", field="grammar"), "m2": Broken("a bug")}
        return 0, wrong.get(rid, [4])

    gate = Gate(scripted(rule))
    gate.gate.open(rows_of(asked_of("m1"), asked_of("m2"), asked_of("m3")))
    answer = gate.look()
    assert found(answer) == {4: [4]}
    (first, invalid), (second, told) = answer.failed
    assert (first, second) == ("m1", "m2")
    assert type(invalid) is InvalidRequest and invalid.field == "grammar"
    assert type(told) is MaskError and "Broken: a bug" in told.message


def test_a_source_that_breaks_when_asked_ends_those_it_was_asked_for() -> None:
    class Breaks(ScriptedSource):
        def ask(self, rows: Sequence[MaskedRow]) -> Any:
            raise Broken("out of order")

    gate = Gate(AllowedTokens(VOCAB), Breaks(lambda rid, outputs: (0, None)))
    gate.gate.open(rows_of(asked_of("m", [1]), asked_of("a", [2])))
    answer = gate.look()
    assert found(answer) == {2: [2]}
    assert [(rid, type(error)) for rid, error in answer.failed] == [("m", MaskError)]


def test_a_source_that_breaks_when_looked_at_ends_its_request() -> None:
    class Breaks:
        def wants(self, request: Request) -> bool:
            return True

        def ask(self, rows: Sequence[MaskedRow]) -> Any:
            return [self for _ in rows]

        def done(self) -> bool:
            raise Broken("gone")

        def forget(self, rid: str) -> None: ...

    gate = Gate(Breaks())
    gate.gate.open(rows_of(asked_of("m")))
    answer = gate.look()
    assert found(answer) == {}
    assert [(rid, type(error)) for rid, error in answer.failed] == [("m", MaskError)]


class Bad(ScriptedSource):
    """Says `answer` for every row, breaks where it has nothing to say, and when a request is
    over."""

    def __init__(self, answer: Any, wants: Any = True) -> None:
        super().__init__(lambda rid, outputs: (0, None))
        self.answer, self.wanted = answer, wants

    def wants(self, request: Request) -> bool:
        if request.rid.startswith(self.prefix):
            return bool(self.wanted)
        return False

    def ask(self, rows: Sequence[MaskedRow]) -> Any:
        return self.answer(rows)

    def forget(self, rid: str) -> None:
        raise Broken("it is not known")


@pytest.mark.parametrize(
    "source",
    [
        Bad(lambda rows: None),
        Bad(lambda rows: [KnownMask(None)] * (len(rows) + 1)),
        Bad(lambda rows: [KnownMask(None)] * (len(rows) - 1)),
        Bad(lambda rows: [None for _ in rows]),
        Bad(lambda rows: [KnownMask([1, 2, 3]) for _ in rows]),
        Bad(lambda rows: [KnownMask("all") for _ in rows]),
        Bad(lambda rows: [KnownMask([[1], [2, 3]]) for _ in rows]),
        Bad(None, wants=np.zeros(2)),
    ],
)
def test_a_source_that_breaks_its_contract_ends_those_it_restricts(source: Any) -> None:
    gate = Gate(AllowedTokens(VOCAB), source)
    gate.gate.open(rows_of(asked_of("m1", [1]), asked_of("a", [2]), asked_of("m2")))
    answer = gate.look()
    assert found(answer) == {2: [2]}
    assert [(rid, type(error)) for rid, error in answer.failed] == [
        ("m1", MaskError),
        ("m2", MaskError),
    ]
    gate.gate.forget_ended([over("m1"), over("a")])


@pytest.mark.parametrize(
    "bits", [np.zeros(2, np.uint32), np.zeros(3, np.int64), np.ones((1, 3), np.uint32)]
)
def test_a_mask_of_another_shape_ends_its_request(bits: Any) -> None:
    class Odd(ScriptedSource):
        def ask(self, rows: Sequence[MaskedRow]) -> Any:
            return [KnownMask(bits) for _ in rows]

    gate = Gate(Odd(lambda rid, outputs: (0, None)))
    gate.gate.open(rows_of(asked_of("m")))
    ((rid, error),) = gate.look().failed
    assert rid == "m" and "uint32 (3,)" in error.message


@pytest.mark.parametrize(
    "allowed,sampling,num_outputs,left",
    [
        ([], {}, 0, None),
        ([3, 4], {"logit_bias": {3: float("-inf")}}, 0, [4]),
        ([3], {"logit_bias": {3: float("-inf")}}, 0, None),
        ([3], {"logit_bias": {3: -1e9}}, 0, [3]),
        ([3, 9], {"min_new_tokens": 2}, 1, [3]),
        ([9], {"min_new_tokens": 2}, 1, None),
        ([9], {"min_new_tokens": 2}, 2, [9]),
    ],
)
def test_bans_count_and_a_row_that_nothing_is_left_for_ends(
    allowed: list[int], sampling: dict[str, Any], num_outputs: int, left: list[int] | None
) -> None:
    request = msgspec.structs.replace(asked_of("m", **sampling), stop_ids=[9])
    gate = Gate(scripted(lambda rid, outputs: (0, allowed)))
    gate.gate.open(rows_of(request, num_outputs=num_outputs))
    answer = gate.look()
    assert found(answer) == ({} if left is None else {0: left})
    assert [type(error) for _, error in answer.failed] == ([MaskError] if left is None else [])


def test_a_mask_of_bits_beyond_the_vocabulary_alone_allows_nothing() -> None:
    class Beyond(ScriptedSource):
        def ask(self, rows: Sequence[MaskedRow]) -> Any:
            return [KnownMask(~bits_of(range(VOCAB), VOCAB)) for _ in rows]

    gate = Gate(Beyond(lambda rid, outputs: (0, None)))
    gate.gate.open(rows_of(asked_of("m")))
    assert [type(error) for _, error in gate.look().failed] == [MaskError]


def test_sources_are_told_who_is_over_once() -> None:
    source = scripted(lambda rid, outputs: (0, [1]))
    gate = Gate(source)
    gate.gate.open(rows_of(asked_of("m1"), asked_of("m2")))
    gate.look()
    going_on = msgspec.structs.replace(over("m2"), finish=None)
    outputs = [over("m1"), going_on, over("other"), over("m1")]
    gate.gate.forget_ended(outputs)
    gate.gate.forget_ended(outputs)
    assert source.forgotten == ["m1"]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5),
            st.sampled_from(["allows", "never", "raises", "nothing", "any", "ends"]),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 6),
)
def test_whatever_sources_do_each_row_is_answered_by_the_deadline(
    fates: list[tuple[int, str]], num_looks: int
) -> None:
    """A row is in the frame, without a mask, ended, or failed with its own error; never two."""

    def rule(rid: str, outputs: list[int]) -> tuple[int, Any]:
        looks, fate = fates[int(rid[1:])]
        answer = {"allows": [4], "raises": Broken("x"), "nothing": [], "any": None}
        return NEVER if fate in ("never", "ends") else looks, answer.get(fate)

    gate = Gate(scripted(rule))
    requests = [asked_of(f"m{number}") for number in range(len(fates))]
    gate.gate.open(rows_of(*requests))
    gate.ended = {f"m{number}" for number, (_, fate) in enumerate(fates) if fate == "ends"}
    failed: dict[str, str] = {}
    answer = Answer(masks=None)
    for _ in range(num_looks + 1):
        answer = gate.look()
        failed |= {rid: type(error).__name__ for rid, error in answer.failed}
        if answer.masks is not None:
            break
        gate.clock.now += 1.001 * TIMEOUT_S / num_looks
    # Whatever was not there by then has failed.
    frame = found(answer)
    for number, (looks, fate) in enumerate(fates):
        rid, row = f"m{number}", 2 * number
        in_time = looks < num_looks
        assert (row in frame) == (fate == "allows" and rid not in failed)
        expected = {"raises": "MaskError", "nothing": "MaskError", "never": "MaskTimeout"}.get(fate)
        if fate == "ends" or (expected is None and in_time):
            assert rid not in failed
        elif in_time or fate == "never":
            assert failed[rid] == expected


def test_while_the_first_is_awaited_the_others_are_seldom_looked_at() -> None:
    """A step may have hundreds of rows, and is looked at until the last of their masks is there."""
    source = scripted(lambda rid, outputs: (30, [3]) if rid == "m0" else (0, [4]))
    gate = Gate(source)
    gate.gate.open(rows_of(*(asked_of(f"m{row}") for row in range(50))))
    looked: list[str] = []

    def runs(row: MaskedRow) -> bool:
        looked.append(row.request.rid)
        return True

    assert gate.gate.pause_s == 0.0
    assert gate.gate.look(runs).masks is None and len(looked) == 50
    looked.clear()
    for _ in range(16):
        assert gate.gate.look(runs).masks is None
    assert len(looked) <= 14 + 2 * 50 and "m49" not in looked[:7]
    while (answer := gate.look()).masks is None:
        pass
    assert len(found(answer)) == 50


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["allows", "raises", "nothing", "ends", "banned", "outside"])),
    st.sampled_from(["there", "late", "raises", "shape", "dtype"]),
    st.randoms(use_true_random=False),
)
def test_masks_computed_together_are_answered_as_row_by_row(
    fates: list[str], job: str, rng: random.Random
) -> None:
    """Whatever becomes of each row, and of all of them."""
    words = num_words(VOCAB)
    bits = np.zeros((len(fates), words), np.uint32)
    errors: dict[int, Exception] = {}
    order = rng.sample(range(len(fates)), len(fates))
    requests = []
    for number, fate in enumerate(fates):
        index = order[number]
        bias = {4: float("-inf")} if fate == "banned" else {}
        requests.append(asked_of(f"m{number}", logit_bias=bias))
        if fate in ("allows", "ends", "banned", "raises"):
            bits[index] = bits_of([4], VOCAB)
        if fate == "raises":
            errors[index] = Broken("x")
        if fate == "outside":
            bits[index, -1] = 1 << 31  # a bit that is no token's
    if job == "shape":
        bits = np.ones((len(fates), words + 1), np.uint32)
    if job == "dtype":
        bits = bits.astype(np.int64)

    class Together(ScriptedSource):
        def ask(self, rows: Sequence[MaskedRow]) -> list[Any]:
            error = Broken("all") if job == "raises" else None
            masks = CountedMasks(NEVER if job == "late" else 0, bits, errors, error)
            return [MaskOf(masks, order[int(row.request.rid[1:])]) for row in rows]

    class Apart(Together):
        def ask(self, rows: Sequence[MaskedRow]) -> list[Any]:
            return [Hidden(part) for part in super().ask(rows)]

    answers = []
    for kind in (Together, Apart):
        gate = Gate(kind(lambda rid, outputs: (0, None)))
        gate.gate.open(rows_of(*requests))
        gate.ended = {f"m{number}" for number, fate in enumerate(fates) if fate == "ends"}
        gate.clock.now += 2 * TIMEOUT_S if job == "late" else 0
        answer = gate.look()
        said = [(rid, type(error), str(error)) for rid, error in answer.failed]
        answers.append((found(answer), said))
    assert answers[0] == answers[1]


def test_masks_computed_together_are_not_waited_for_on_behalf_of_rows_that_ended() -> None:
    bits = np.ones((3, num_words(VOCAB)), np.uint32)

    class Never(ScriptedSource):
        def ask(self, rows: Sequence[MaskedRow]) -> list[Any]:
            masks = CountedMasks(NEVER, bits, {}, None)
            return [MaskOf(masks, number) for number in range(len(rows))]

    gate = Gate(Never(lambda rid, outputs: (0, None)))
    gate.gate.open(rows_of(*(asked_of(f"m{row}") for row in range(3))))
    assert gate.look().masks is None and gate.look().masks is None
    gate.ended = {"m0", "m1", "m2"}
    assert found(gate.look()) == {}


class Hidden:
    """A mask that does not tell that it was computed with others."""

    def __init__(self, part: MaskOf) -> None:
        self.done, self.result = part.done, part.result
