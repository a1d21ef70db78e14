"""Responses that are kept stay within their bounds, the newest longest."""

from __future__ import annotations

from typing import Any

import pytest

from rollout.http.openai.responses.store import ResponseStore, UnknownPrevious, UnknownResponse


def response(size: int = 1) -> dict[str, Any]:
    return {"output": [{"text": "x" * size}]}


def test_the_oldest_leave_by_count() -> None:
    store = ResponseStore(max_responses=2)
    for name in "abc":
        store.add(name, response(), [], [])
    assert len(store) == 2
    with pytest.raises(UnknownResponse):
        store.get("a")
    assert store.conversation("c") == response()["output"]
    # Stored again, it is the newest.
    store.add("b", response(), [], [])
    store.add("d", response(), [], [])
    with pytest.raises(UnknownPrevious):
        store.conversation("c")
    assert store.get("b")


def test_the_oldest_leave_by_bytes_of_their_whole_conversations() -> None:
    store = ResponseStore(max_bytes=10_000)
    store.add("a", response(1000), [], [])
    store.add("b", response(1000), [], store.conversation("a"))
    assert len(store) == 2
    store.add("c", response(1000), [{"text": "y" * 2000}], store.conversation("b"))
    with pytest.raises(UnknownResponse):
        store.get("a")
    assert [len(item["text"]) for item in store.conversation("c")] == [1000, 1000, 2000, 1000]
    store.add("d", response(20_000), [], [])
    assert len(store) == 2, "what never fits drives nobody out"


def test_what_is_deleted_gives_its_room_back() -> None:
    store = ResponseStore(max_bytes=3000)
    for number in range(50):
        store.add(str(number), response(1000), [], [])
        assert store.discard(str(number))
        assert not store.discard(str(number))
    store.add("a", response(1000), [], [])
    assert len(store) == 1
