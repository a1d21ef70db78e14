"""Turns of a session: what each computes, what it keeps, and what becomes of that."""

from __future__ import annotations

import pytest

from engine.config import SessionConfig
from engine.errors import (
    ContextTooLong,
    InvalidRequest,
    SessionBusy,
    SlipstreamError,
    StoreFull,
    UnknownSession,
)
from engine.protocol import CloseSession, GetSession, Stop, VersionSpan
from tests.helpers.scheduling import check_output, make_request
from tests.helpers.session_turns import SessionBench

POLICIES = ["keep", "recompute", "fresh"]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_turn_computes_its_new_tokens_alone(overlap: bool, prefix_cache: bool) -> None:
    bench = SessionBench(overlap=overlap, prefix_cache=prefix_cache)
    bench.open()
    bench.turn("a", range(10), max_new=7)
    size, held, before = len(bench.tokens()), bench.held(), bench.executor.num_computed
    # The last token was sampled and is in no cache, unless a step was ahead.
    assert size == 17 and held in (16, 17)
    output = bench.turn("b", [40, 41, 42], max_new=5)
    assert output.cached_tokens == held
    assert bench.executor.num_computed - before in (size - held + 3 + 4, size - held + 3 + 5)
    assert bench.turn("c", [50], max_new=2).cached_tokens >= 24


def test_several_sessions_share_what_they_begin_with() -> None:
    bench = SessionBench()
    for name in "xyz":
        bench.open(name)
        output = bench.turn(name, [*range(12), ord(name) % 97], session=name, max_new=6)
        assert output.cached_tokens == (0 if name == "x" else 12)
    for name in "xyz":
        assert bench.turn(f"{name}2", [7], session=name, max_new=3).cached_tokens >= 18


@pytest.mark.parametrize("policy", POLICIES)
def test_an_update_between_turns_does_what_the_last_turn_stated(policy: str) -> None:
    bench = SessionBench()
    bench.open()
    bench.turn("a", range(10), max_new=7, kv_policy=policy)
    bench.set_version(1)
    output = bench.turn("b", [40, 41], max_new=4, kv_policy=policy)
    if policy == "keep":
        assert output.cached_tokens == 16
        assert output.kv_spans == [VersionSpan(0, 0, 16), VersionSpan(1, 16, 22)]
    else:
        assert output.cached_tokens == 0
        assert output.kv_spans == [VersionSpan(1, 0, 22)]
    assert output.spans == [VersionSpan(1, 0, 4)]
    # KV of two versions is nobody else's.
    bench.add(make_request("other", bench.tokens(), max_new=1))
    bench.finish()
    assert bench.outputs["other"][0].cached_tokens == (0 if policy == "keep" else 20)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("overlap", [False, True])
def test_an_update_during_a_turn(policy: str, overlap: bool) -> None:
    bench = SessionBench(overlap=overlap)
    bench.open()
    bench.turn("a", range(10), max_new=4, kv_policy=policy)
    request = make_request("b", [40, 41], max_new=8, session="s", kv_policy=policy)
    whole = bench.whole(request)
    bench.add(request)
    for _ in range(4):
        bench.step()
    bench.set_version(1)
    bench.finish()
    bench.check_kv_spans(whole, bench.outputs["b"][0])
    output = bench.turn("c", [50], max_new=3, kv_policy=policy)
    assert output.cached_tokens >= 20, "what the turn left is there, stale or not"


def test_a_turn_that_wants_no_stale_kv_gets_none() -> None:
    bench = SessionBench()
    bench.open()
    bench.turn("a", range(10), max_new=7, kv_policy="keep")
    bench.set_version(1)
    output = bench.turn("b", [40], max_new=4, kv_policy="recompute")
    assert (output.cached_tokens, output.kv_spans) == (0, [VersionSpan(1, 0, 21)])


def test_kv_is_given_up_for_others_and_computed_again() -> None:
    bench = SessionBench(num_pages=16, context_length=64)
    for name in ("old", "new"):
        bench.open(name)
        bench.turn(name, range(9), session=name, max_new=10, seed=ord(name[0]))
    assert bench.held("old") == bench.held("new") == 18
    bench.add(make_request("big", range(60, 90), max_new=12))
    bench.finish()
    assert bench.outputs["big"][-1].num_retractions == 0
    assert (bench.held("old"), bench.held("new")) == (0, 18), "the one used last stays"
    bench.add(make_request("all", range(20, 80), max_new=4))
    bench.finish()
    assert bench.held("new") == 0
    for name in ("old", "new"):
        assert len(bench.tokens(name)) == 19
        bench.turn(f"{name}2", [5, 6], session=name, max_new=6)


def test_released_memory_and_flushed_caches_cost_the_kv_alone() -> None:
    bench = SessionBench()
    bench.open()
    bench.turn("a", range(10), max_new=7)
    bench.scheduler.flush_cache()
    assert bench.cache.num_free == bench.cache.num_pages
    assert bench.turn("b", [40], max_new=4).cached_tokens == 0


def test_pauses_leave_sessions_alone() -> None:
    bench = SessionBench()
    bench.open()
    bench.turn("a", range(10), max_new=7)
    for mode in ("keep", "retract", "abort"):
        bench.keep(bench.scheduler.pause(mode))
        bench.add(make_request(mode, [40], max_new=4, session="s"))
        assert bench.step() is None
        bench.scheduler.resume()
        bench.finish()
    assert len(bench.tokens()) == 17 + 3 * 5


@pytest.mark.parametrize("every", [True, False])
def test_a_turn_that_is_aborted_leaves_its_session_as_it_was(every: bool) -> None:
    bench = SessionBench()
    bench.open()
    bench.turn("a", range(10), max_new=7)
    before = bench.tokens()
    bench.add(make_request("b", [40, 41], max_new=9, session="s"))
    for _ in range(3):
        bench.step()
    bench.keep(bench.scheduler.abort(all=every, rids=[] if every else ["b"]))
    bench.finish()
    assert bench.outputs["b"][-1].finish.type == "abort"
    assert bench.tokens() == before
    bench.turn("c", [40, 41], max_new=9)
    assert bench.outputs["c"][0].token_ids.tolist() != []


def test_a_session_goes_on_from_an_earlier_point() -> None:
    bench = SessionBench()
    bench.open()
    bench.turn("a", range(10), max_new=7)
    first = bench.tokens()
    bench.turn("b", [40, 41], max_new=5)
    output = bench.turn("c", [60], max_new=3, session_at=len(first))
    assert output.cached_tokens >= 16
    assert bench.tokens()[: len(first)] == first
    bench.turn("d", [1], max_new=2, session_at=0)
    assert len(bench.tokens()) == 3


def test_stale_kv_is_cut_where_a_turn_goes_on() -> None:
    bench = SessionBench()
    for name in "st":
        bench.open(name)
        bench.turn(name, [*range(10), ord(name) - 100], session=name, max_new=7, kv_policy="keep")
    bench.set_version(1)
    # Inside a page that two sessions hold, and inside one that is the session's own.
    assert bench.turn("s2", [60], max_new=3, session="s", session_at=6).cached_tokens == 4
    assert bench.turn("t2", [60], max_new=3, session="t", session_at=14).cached_tokens == 14
    assert bench.turn("t3", [61], max_new=3, session="t").cached_tokens == 17


@pytest.mark.parametrize("late", [True, False])
def test_a_stop_string_ends_the_turn_where_it_was_seen(late: bool) -> None:
    bench = SessionBench()
    bench.open()
    bench.add(make_request("a", range(10), max_new=7, session="s", stream=True))
    for _ in range(5):
        bench.step()
    if late:
        bench.finish()
    bench.keep(bench.turns.stop(Stop(rid="a", num_tokens=3, matched="x", session="s")))
    bench.finish()
    tokens = [t for output in bench.outputs["a"] for t in output.token_ids.tolist()]
    assert bench.tokens() == [*range(10), *tokens[:3]]
    bench.turn("b", [4], max_new=3)


def test_a_session_that_is_idle_is_closed_in_time() -> None:
    bench = SessionBench(sessions=SessionConfig(session_timeout_s=50))
    bench.open()
    bench.open("brief", timeout_s=10)
    bench.turn("a", range(10), max_new=7)
    bench.clock.now += 11
    with pytest.raises(UnknownSession, match="after 10 s"):
        bench.turns.sessions.get("brief")
    bench.add(make_request("b", [1], max_new=3, session="s"))
    bench.clock.now += 100
    assert bench.turns.facts["num_sessions"] == 1, "a turn is in progress"
    bench.finish()
    bench.clock.now += 49
    bench.turn("c", [1], max_new=3)
    bench.clock.now += 51
    assert bench.turns.facts == {"num_sessions": 0, "num_rollouts": 0, "held_pages": 0}
    bench.check_empty()


def test_refusals_name_what_they_are_about() -> None:
    bench = SessionBench(
        context_length=64,
        sessions=SessionConfig(max_sessions=2, session_timeout_s=50, session_tokens=60),
    )
    bench.open()

    def refused(kind: type[SlipstreamError], field: str, **fields: object) -> None:
        with pytest.raises(kind) as caught:
            bench.add(make_request("r", range(4), **{"max_new": 3, "session": "s", **fields}))
        assert type(caught.value) is kind and caught.value.field == field
        assert not bench.turns.sessions.get("s").rid and not bench.scheduler.has_work()

    refused(UnknownSession, "session", session="other")
    refused(InvalidRequest, "session_at", session="", session_at=0)
    refused(InvalidRequest, "session_at", session_at=1)
    refused(InvalidRequest, "hold_at", hold_at=2)
    refused(InvalidRequest, "prompt_logprob_start", prompt_logprob_start=0)
    refused(InvalidRequest, "top_k", top_k=0)
    for field, wrong in (("session", "a/b"), ("session", "s"), ("max_tokens", 65)):
        with pytest.raises(InvalidRequest) as caught:
            bench.open(**{"name": "t", {"session": "name"}.get(field, field): wrong})
        assert caught.value.field == field
    with pytest.raises(InvalidRequest, match="timeout_s"):
        bench.open("t", timeout_s=51)
    bench.open("t", max_tokens=12)
    with pytest.raises(StoreFull):
        bench.open("u")
    with pytest.raises(ContextTooLong):
        bench.add(make_request("long", range(12), session="t"))
    bench.turn("short", range(10), session="t", max_new=2)
    bench.add(make_request("a", range(9), max_new=30, session="s"))
    with pytest.raises(SessionBusy):
        bench.add(make_request("b", range(9), max_new=1, session="s"))
    with pytest.raises(ContextTooLong):
        bench.add(make_request("c", range(9), max_new=1, session="t"))
    bench.turns.handle(CloseSession(session="t"))
    bench.open("v")
    with pytest.raises(StoreFull):
        bench.add(make_request("d", range(20), max_new=10, session="v"))
    bench.finish()


def test_a_session_that_is_closed_ends_its_turn_and_holds_nothing() -> None:
    bench = SessionBench()
    bench.open()
    bench.turn("a", range(10), max_new=7)
    assert bench.turns.handle(GetSession(session="s")).session.token_ids.tolist() == bench.tokens()
    bench.add(make_request("b", [40], max_new=9, session="s"))
    bench.step()
    bench.turns.handle(CloseSession(session="s"))
    assert bench.outputs["b"][-1].finish.type == "abort"
    bench.finish()
    bench.check_empty()
    with pytest.raises(UnknownSession, match="was closed"):
        bench.turns.handle(GetSession(session="s"))
    bench.open()
    assert bench.tokens() == []


def test_an_engine_that_forgets_its_kv_keeps_the_tokens() -> None:
    bench = SessionBench()
    bench.open()
    bench.turn("a", range(10), max_new=7)
    bench.cache.reset()
    assert bench.held() == 0
    bench.turn("b", [4], max_new=3)


def test_a_page_that_a_turn_goes_on_writing_is_copied_by_nobody() -> None:
    """In one plan: a request that begins as the session does, and the turn that fills its page."""
    bench = SessionBench()
    bench.open()
    bench.turn("a", range(10), max_new=1)
    assert bench.held() % bench.cache.page_size
    other = make_request("other", [*range(10), 60, 61], max_new=3, priority=1)
    turn = make_request("b", [40, 41, 42], max_new=3, session="s")
    whole = bench.whole(turn)
    bench.add(other, turn)
    bench.finish()
    check_output(other, bench.outputs["other"][0])
    check_output(whole, bench.outputs["b"][0])
