"""Steps that wait for masks, as the leader drives them: in order, beside the others, whatever comes
between a plan and its masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import OutOfMemory
from engine.protocol import (
    Abort,
    BeginUpdate,
    CommitUpdate,
    FlushCache,
    GetState,
    LoadFromDisk,
    Pause,
    Request,
    RequestOutput,
    Resume,
    StepMasks,
    StepPlan,
    StepResult,
    Stop,
)
from rollout.replica.columns import from_columns
from rollout.replica.leader import Leader
from tests.helpers.fake_executor import (
    NOT_FINITE,
    NUM_PRINTABLE,
    POISON,
    FakeExecutor,
    expected_tokens,
    next_token,
)
from tests.helpers.mask_sources import NEVER, Broken, ScriptedSource
from tests.helpers.replicas import fake_config, make_request

TIMEOUT_S = 0.05
"""Short where a mask never comes; nothing is measured against it."""


class Watched:
    """A launched step whose result is noted."""

    def __init__(self, pending: Any, plan: StepPlan, events: list[tuple[str, int]]) -> None:
        self.pending, self.plan, self.events = pending, plan, events

    def result(self) -> StepResult:
        self.events.append(("collect", self.plan.step))
        return self.pending.result()


class Noting(FakeExecutor):
    """Notes what it is told, in order. refuses: steps whose masks are refused."""

    refuses: Sequence[int] = ()

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.events: list[tuple[str, int]] = []

    def launch(self, plan: StepPlan) -> Any:
        self.events.append(("launch", plan.step))
        return Watched(super().launch(plan), plan, self.events)

    def mask(self, masks: StepMasks) -> None:
        self.events.append(("mask", masks.step))
        if masks.step in self.refuses:
            raise OutOfMemory("no room for the logits", field="rank 0")
        super().mask(masks)


class Engine:
    """A leader over the fake executor, and what came of it."""

    def __init__(
        self,
        *sources: ScriptedSource,
        overlap: bool = True,
        num_pages: int = 256,
        timeout_s: float = 30.0,
    ) -> None:
        config = fake_config(overlap=overlap, num_pages=num_pages)
        scheduler = replace(config.scheduler, mask_timeout_s=timeout_s)
        config = replace(config, scheduler=scheduler)
        self.executor = Noting(config)
        self.leader = Leader(config, self.executor, mask_sources=sources)
        self.outputs: list[RequestOutput] = []

    def step(self) -> list[RequestOutput]:
        found = from_columns(self.leader.step())
        self.outputs += found
        return found

    def run(self, *requests: Request) -> dict[str, RequestOutput]:
        """Until idle; the final outputs by id."""
        self.leader.submit(requests)
        for _ in range(20_000):
            if self.leader.idle():
                return self.finals
            self.step()
        raise AssertionError("it does not become idle")

    @property
    def finals(self) -> dict[str, RequestOutput]:
        return {output.rid: output for output in self.outputs if output.finish is not None}


def asked_of(
    rid: str, prompt: list[int], allowed: Sequence[int] | None = None, **fields: Any
) -> Request:
    own = {name: fields.pop(name) for name in ("stream", "group", "output_ids") if name in fields}
    ids = None if allowed is None else np.array(allowed, np.int32)
    request = make_request(rid, prompt, **fields)
    return msgspec.structs.replace(request, allowed_token_ids=ids, **own)


ANY = list(range(NUM_PRINTABLE))


def rule_of(outputs: list[int]) -> list[int]:
    """A small grammar: what may come depends on every token so far."""
    first = sum((at + 1) * token for at, token in enumerate(outputs))
    return sorted((first + 17 * number) % NUM_PRINTABLE for number in range(4))


def ruled(request: Request, count: int = 8) -> list[int]:
    """What a request of `rule_of` and its own `allowed_token_ids` gives."""
    tokens, outputs = request.prompt_ids.tolist(), []
    for _ in range(count):
        token = next_token(tokens, 0, sorted({*rule_of(outputs)} & {*request.allowed_token_ids}))
        tokens.append(token)
        outputs.append(token)
    return outputs


def check(output: RequestOutput, tokens: list[int]) -> None:
    assert output.finish is not None and output.finish.type == "length", output.finish
    assert output.token_ids.tolist() == tokens
    np.testing.assert_allclose(output.logprobs, -np.array(tokens) / 100, atol=1e-6)


def error_of(output: RequestOutput) -> str | None:
    assert output.finish is not None and output.finish.type == "abort"
    return output.finish.error


@pytest.mark.parametrize("overlap", [True, False])
def test_only_allowed_tokens_come_and_neighbours_do_not_notice(overlap: bool) -> None:
    engine = Engine(overlap=overlap)
    allowed = [3, 50, 77, 91]
    finals = engine.run(
        asked_of("a", [1, 2], allowed), asked_of("b", [4, 5]), asked_of("c", [1, 2], [60])
    )
    check(finals["a"], expected_tokens([1, 2], 8, allowed=allowed))
    check(finals["b"], expected_tokens([4, 5], 8))
    check(finals["c"], [60] * 8)
    assert not engine.leader._masked._gate._asked, "a request that is over is remembered"


def test_a_plan_is_launched_then_the_last_step_collected_then_its_masks_sent() -> None:
    source = ScriptedSource(lambda rid, outputs: (0, rule_of(outputs)))
    engine = Engine(source)
    request = asked_of("m", [1, 2], ANY)
    finals = engine.run(request)
    check(finals["m"], ruled(request))
    events = engine.executor.events
    assert events[:6] == [
        ("launch", 0),
        ("mask", 0),
        ("launch", 1),
        ("collect", 0),
        ("mask", 1),
        ("launch", 2),
    ]
    for step in range(1, 8):
        at = [events.index((what, step)) for what in ("launch", "mask", "collect")]
        before = events.index(("collect", step - 1))
        assert at[0] < before < at[1] < at[2], "a mask before the token that it depends on"
    # Each was asked for with all tokens before it.
    tokens = finals["m"].token_ids.tolist()
    assert source.asked == [("m", tokens[:size]) for size in range(8)]


def test_steps_without_masked_rows_run_as_they_did() -> None:
    engine = Engine()
    engine.run(asked_of("a", [1, 2]), asked_of("b", [4, 5]))
    events = engine.executor.events
    assert events[:4] == [("launch", 0), ("launch", 1), ("collect", 0), ("launch", 2)]
    assert not any(what == "mask" for what, _ in events)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_mask_that_comes_late_delays_its_step_and_nothing_is_lost(overlap: bool) -> None:
    source = ScriptedSource(lambda rid, outputs: (len(outputs) % 3, rule_of(outputs)))
    engine = Engine(source, overlap=overlap)
    request = asked_of("m", [1, 2], ANY)
    finals = engine.run(request, asked_of("b", [4, 5]))
    check(finals["m"], ruled(request))
    check(finals["b"], expected_tokens([4, 5], 8))


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize(
    "fate,error",
    [
        ((NEVER, [1]), "MaskTimeout"),
        ((0, Broken("a bug")), "MaskError"),
        ((0, []), "MaskError"),
        ((2, []), "MaskError"),
    ],
)
def test_a_mask_that_fails_ends_its_request_with_what_it_had(
    overlap: bool, at: int, fate: Any, error: str
) -> None:
    def rule(rid: str, outputs: list[int]) -> Any:
        return fate if rid == "m1" and len(outputs) == at else (0, rule_of(outputs))

    # A deadline for what is late alone: on a busy machine anything takes longer than that one.
    timeout_s = TIMEOUT_S if error == "MaskTimeout" else 60.0
    engine = Engine(ScriptedSource(rule), overlap=overlap, timeout_s=timeout_s)
    first, second = asked_of("m1", [1, 2], ANY), asked_of("m2", [3, 2], ANY)
    finals = engine.run(first, second, asked_of("b", [4, 5]))
    assert error_of(finals["m1"]) == error
    assert finals["m1"].token_ids.tolist() == ruled(first)[:at]
    check(finals["m2"], ruled(second))
    check(finals["b"], expected_tokens([4, 5], 8))
    # Its slot and pages are free, and the next request of its id is another.
    check(engine.run(asked_of("m1", [9, 9], [5]), asked_of("c", [6]))["c"], expected_tokens([6], 8))


def test_while_a_mask_is_late_commands_are_answered_and_the_last_step_is_returned() -> None:
    late = {"m": NEVER}
    source = ScriptedSource(lambda rid, outputs: (late["m"] if outputs else 0, rule_of(outputs)))
    engine = Engine(source)
    engine.leader.submit([asked_of("m", [1, 2], ANY), asked_of("b", [4, 5], stream=True)])
    for _ in range(20):
        engine.step()
    assert [len(output.token_ids) for output in engine.outputs if output.rid == "b"] == [1]
    assert engine.executor.events[-1] == ("collect", 0)
    assert engine.leader.can_step() and not engine.leader.idle()
    state = engine.leader.handle(GetState()).state
    assert state is not None and state.num_running == 2
    # Whoever it is late for leaves; the other goes on at the next look.
    engine.leader.handle(Abort(rid="m"))
    finals = engine.run()
    assert error_of(finals["m"]) is None and len(finals["m"].token_ids) == 1
    streamed = [token for o in engine.outputs if o.rid == "b" for token in o.token_ids.tolist()]
    assert streamed == expected_tokens([4, 5], 8)


def test_a_stop_between_a_plan_and_its_masks_cuts_as_ever() -> None:
    source = ScriptedSource(lambda rid, outputs: (5 if len(outputs) == 3 else 0, rule_of(outputs)))
    engine = Engine(source)
    request = asked_of("m", [1, 2], ANY)
    engine.leader.submit([request, asked_of("b", [4, 5])])
    while len(source.asked) < 4:
        engine.step()
    assert engine.leader._masked.waits
    engine.leader.handle(Stop(rid="m", num_tokens=2, matched="x"))
    finals = engine.run()
    assert finals["m"].token_ids.tolist() == ruled(request)[:2]
    check(finals["b"], expected_tokens([4, 5], 8))


@pytest.mark.parametrize("mode", ["keep", "retract", "abort"])
def test_a_pause_waits_for_the_masks_of_the_step_in_flight(mode: str) -> None:
    source = ScriptedSource(lambda rid, outputs: (4 if len(outputs) == 3 else 0, rule_of(outputs)))
    engine = Engine(source)
    request = asked_of("m", [1, 2], ANY)
    engine.leader.submit([request, asked_of("b", [4, 5])])
    while len(source.asked) < 4:
        engine.step()
    assert engine.leader._masked.waits
    engine.leader.handle(Pause(mode=mode))
    assert engine.executor.events[-2:] == [("mask", 3), ("collect", 3)]
    engine.leader.handle(Resume())
    finals = engine.run()
    if mode == "abort":
        assert finals["m"].token_ids.tolist() == ruled(request)[:4]
        engine.leader.handle(FlushCache())
        return
    check(finals["m"], ruled(request))
    check(finals["b"], expected_tokens([4, 5], 8))


@pytest.mark.parametrize("policy", ["keep", "recompute", "fresh"])
def test_an_update_falls_between_steps_and_masks_follow_the_tokens_that_stay(policy: str) -> None:
    source = ScriptedSource(lambda rid, outputs: (2, rule_of(outputs)))
    engine = Engine(source)
    request = msgspec.structs.replace(asked_of("m", [1, 2], ANY), kv_policy=policy)
    engine.leader.submit([request])
    while len(source.asked) < 4:
        engine.step()
    engine.leader.handle(BeginUpdate(version=1))
    engine.leader.handle(LoadFromDisk(path="step_0"))
    engine.leader.handle(CommitUpdate(version=1))
    finals = engine.run()
    check(finals["m"], ruled(request))
    sizes = [len(outputs) for _, outputs in source.asked]
    restarted = [0, *range(1, 8)] if policy == "fresh" else list(range(4, 8))
    assert sizes == [0, 1, 2, 3, *restarted]


def test_refused_masks_end_what_runs_and_the_next_requests_run() -> None:
    engine = Engine()
    engine.executor.refuses = [2]
    finals = engine.run(asked_of("a", [1, 2], [5, 6]), asked_of("b", [4, 5]))
    assert {error_of(output) for output in finals.values()} == {"OutOfMemory"}
    check(engine.run(asked_of("c", [6, 7], [9, 8]))["c"], expected_tokens([6, 7], 8, 0, [8, 9]))


def test_a_step_that_fails_takes_the_one_that_waits_behind_it_along() -> None:
    """The result of step N breaks when N + 1 was launched, whose masks are never asked for."""
    source = ScriptedSource(lambda rid, outputs: (0, rule_of(outputs)))
    engine = Engine(source)
    engine.leader.submit([asked_of("m", [1, 2], ANY)])
    for _ in range(3):
        engine.step()
    asked = len(source.asked)
    engine.leader.submit([asked_of("bad", [POISON])])
    finals = engine.run()
    assert {error_of(output) for output in finals.values()} == {"OutOfMemory"}
    # The step with the poisoned prompt, whose own error comes with its result.
    assert len(source.asked) <= asked + 2
    check(engine.run(asked_of("m", [3, 3], ANY))["m"], ruled(asked_of("m", [3, 3], ANY)))


def test_a_masked_row_that_is_not_finite_ends_alone() -> None:
    engine = Engine()
    finals = engine.run(asked_of("a", [NOT_FINITE, 2], [5, 6]), asked_of("b", [4, 5], [7]))
    assert error_of(finals["a"]) == "NonFiniteLogits" and len(finals["a"].token_ids) == 2
    check(finals["b"], [7] * 8)


def test_a_reply_goes_on_from_its_tokens_under_the_same_masks() -> None:
    whole = asked_of("m", [1, 2], ANY)
    for cut in (1, 4, 7):
        source = ScriptedSource(lambda rid, outputs: (0, rule_of(outputs)))
        given_ids = np.array(ruled(whole)[:cut], np.int32)
        finals = Engine(source).run(msgspec.structs.replace(whole, output_ids=given_ids))
        assert finals["m"].start == cut
        assert finals["m"].token_ids.tolist() == ruled(whole)[cut:]
        assert [len(outputs) for _, outputs in source.asked] == list(range(cut, 8))


def test_stops_and_minimum_count_in_masked_rows() -> None:
    stops = {"stop_token_ids": [12]}
    request = msgspec.structs.replace(asked_of("m", [1, 2], [12, 13], **stops), stop_ids=[12])
    free = Engine().run(request)["m"].token_ids.tolist()
    want = expected_tokens([1, 2], 8, allowed=[12, 13])
    assert free == want[: want.index(12) + 1]
    sampling = msgspec.structs.replace(request.sampling, min_new_tokens=5)
    held = Engine().run(msgspec.structs.replace(request, sampling=sampling))["m"]
    assert held.token_ids.tolist()[:5] == [13] * 5


def test_bad_ids_are_refused_alone_and_by_name() -> None:
    engine = Engine()
    none, high = asked_of("none", [1], []), asked_of("high", [1], [5, 300])
    finals = engine.run(none, high, asked_of("a", [1, 2], [299]), asked_of("b", [4, 5]))
    for rid in ("none", "high"):
        assert error_of(finals[rid]) == "InvalidRequest"
        assert "allowed_token_ids" in str(finals[rid].finish.message)
    # The end of sequence may be all that is allowed.
    assert finals["a"].finish.matched == 299
    check(finals["b"], expected_tokens([4, 5], 8))


@settings(max_examples=60)
@given(st.data())
def test_whatever_happens_requests_get_what_they_get_alone(data: st.DataObject) -> None:
    """Random requests, masks that are late or fail, a pool that is too small, aborts and pauses in
    between: what comes is the beginning of what a request gets alone, all of it unless it ended."""
    draw = data.draw
    delays = draw(st.lists(st.integers(0, 3), min_size=1, max_size=7))
    broken = draw(st.sets(st.integers(0, 7), max_size=2))
    looks = iter(range(10**6))

    def rule(rid: str, outputs: list[int]) -> Any:
        if int(rid[1:]) in broken and len(outputs) == 3:
            return 1, Broken("a bug")
        return delays[next(looks) % len(delays)], rule_of(outputs)

    overlap = draw(st.booleans())
    engine = Engine(ScriptedSource(rule), overlap=overlap, num_pages=draw(st.integers(12, 40)))
    requests: dict[str, Request] = {}
    for number in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from("mab"))
        prompt = [number + 1, *draw(st.lists(st.integers(1, 60), max_size=9))]
        allowed = None if kind == "b" else ANY if kind == "m" else [4, 9, 40]
        request = asked_of(
            f"{kind}{number}", prompt, allowed, stream=draw(st.booleans()), group=kind
        )
        requests[request.rid] = request
    engine.leader.submit(list(requests.values()))
    aborted: set[str] = set()
    happens = st.sampled_from(["abort", "keep", "retract"])
    events = dict(draw(st.lists(st.tuples(st.integers(0, 30), happens), max_size=4)))
    for at in range(3000):
        match events.get(at):
            case "abort":
                aborted.add(rid := draw(st.sampled_from(sorted(requests))))
                engine.leader.handle(Abort(rid=rid))
            case "keep" | "retract" as mode:
                engine.leader.handle(Pause(mode=mode))
                engine.step()
                engine.leader.handle(Resume())
        if engine.leader.idle():
            break
        engine.step()
    assert engine.leader.idle()
    engine.leader._scheduler.check_integrity()
    for rid, request in requests.items():
        own = [output for output in engine.outputs if output.rid == rid]
        tokens = [token for output in own for token in output.token_ids.tolist()]
        match rid[0]:
            case "m":
                want = ruled(request)
            case "a":
                want = expected_tokens(request.prompt_ids.tolist(), 8, allowed=[4, 9, 40])
            case _:
                want = expected_tokens(request.prompt_ids.tolist(), 8)
        assert tokens == want[: len(tokens)], rid
        finish = own[-1].finish
        assert finish is not None
        if rid[0] == "m" and int(rid[1:]) in broken and finish.type == "abort":
            assert len(tokens) == 3 or rid in aborted
        elif rid not in aborted:
            assert (finish.type, len(tokens)) == ("length", 8), (rid, finish)
