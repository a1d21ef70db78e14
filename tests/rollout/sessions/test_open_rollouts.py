"""The limits of captured rollouts: how many, how long, how much memory."""

from __future__ import annotations

import pytest

from engine.config import SessionConfig
from engine.errors import InvalidRequest, StoreFull, UnknownRollout
from engine.protocol import (
    BeginCall,
    CloseRollout,
    EndCall,
    GetRollout,
    OpenRollout,
    PromptQuery,
    RewardRollout,
)
from rollout.sessions.open_rollouts import OpenRollouts
from tests.helpers.session_turns import Clock
from tests.rollout.sessions.test_call_tree import sample


def test_a_rollout_expires_when_nobody_uses_it() -> None:
    clock = Clock()
    store = OpenRollouts(SessionConfig(rollout_timeout_s=50), clock)
    store.handle(OpenRollout(rollout="a"))
    store.handle(OpenRollout(rollout="b", timeout_s=10))
    clock.now += 11
    with pytest.raises(UnknownRollout, match="after 10 s"):
        store.handle(GetRollout(rollout="b"))
    store.handle(BeginCall(rollout="a", prompts=[PromptQuery()]))
    clock.now += 49
    store.handle(GetRollout(rollout="a"))
    clock.now += 51
    with pytest.raises(UnknownRollout):
        store.handle(GetRollout(rollout="a"))
    assert len(store) == 0


def test_a_call_is_open_until_it_is_recorded() -> None:
    store = OpenRollouts(SessionConfig())
    store.handle(OpenRollout(rollout="a"))

    def complete() -> bool:
        return store.handle(GetRollout(rollout="a")).rollout.complete

    assert complete()
    for call in range(3):
        reply = store.handle(BeginCall(rollout="a", prompts=[PromptQuery()]))
        assert reply.rollout.call == call and not complete()
        failed, refused = ("no", True) if call == 1 else ("", False)
        store.handle(EndCall(rollout="a", call=call, failed=failed, refused=refused))
        assert complete()
    store.handle(BeginCall(rollout="a", prompts=[PromptQuery()]))
    store.handle(EndCall(rollout="a", call=3, failed="the client left"))
    assert not complete()
    for wrong in (3, 9):
        with pytest.raises(InvalidRequest, match="not in progress"):
            store.handle(EndCall(rollout="a", call=wrong))


def test_limits_are_refused_by_name() -> None:
    store = OpenRollouts(SessionConfig(max_rollouts=2, rollout_timeout_s=50, rollout_bytes=8000))
    for field, wrong in (("rollout", "a/b"), ("timeout_s", 51.0)):
        with pytest.raises(InvalidRequest) as caught:
            store.handle(OpenRollout(**{field: wrong}))
        assert caught.value.field == field
    store.handle(OpenRollout(rollout="a"))
    with pytest.raises(InvalidRequest, match="already"):
        store.handle(OpenRollout(rollout="a"))
    store.handle(OpenRollout(rollout="b"))
    with pytest.raises(StoreFull):
        store.handle(OpenRollout())
    store.handle(BeginCall(rollout="a", prompts=[]))
    with pytest.raises(StoreFull, match="8000"):
        store.handle(EndCall(rollout="a", call=0, samples=[sample([1] * 2000, [2])]))
    state = store.handle(GetRollout(rollout="a")).rollout
    assert not state.complete and "bytes" in state.calls[0].failed
    store.handle(CloseRollout(rollout="b"))
    store.handle(BeginCall(rollout="a", prompts=[]))
    store.handle(EndCall(rollout="a", call=1, samples=[sample([1] * 20, [2])]))
    with pytest.raises(InvalidRequest) as caught:
        store.handle(RewardRollout(rollout="a", reward=1.0, call=2))
    assert caught.value.field == "call"
    store.handle(RewardRollout(rollout="a", reward=1.0, call=1))
    assert store.handle(GetRollout(rollout="a")).rollout.calls[1].reward == 1.0
