"""A link that is dropped by one thread while another waits on it."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable

import pytest
import torch
from torch.distributed import HashStore

from engine.errors import GroupError
from trainer_bridge.links import GlooLink
from trainer_bridge.process_group import SenderGroup


class _Work:
    """Ends without an error; `meanwhile` happens before it does."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self._meanwhile = meanwhile

    def wait(self, timeout: object) -> None:
        self._meanwhile()


def alone() -> GlooLink:
    """A link with no other member, whose broadcasts end at once."""
    return GlooLink(HashStore(), 1, 60.0)


def test_a_work_that_was_waited_for_is_forgotten() -> None:
    link = alone()
    work = link.broadcast(torch.ones(1), lambda: None)
    link.wait(work, time.monotonic() + 60, lambda: None)
    link.abort()


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_wait_on_a_dropped_link_says_so(when: str) -> None:
    link = alone()
    work = link.broadcast(torch.ones(1), lambda: None)
    if when == "before":
        link.abort()
    else:
        work.work = _Work(link.abort)
    with pytest.raises(RuntimeError, match="dropped"):
        link.wait(work, time.monotonic() + 60, lambda: None)


def test_a_link_that_was_dropped_between_two_messages_says_so() -> None:
    link = alone()
    link.broadcast(torch.ones(1), lambda: None)
    link.abort()
    with pytest.raises(RuntimeError, match="dropped"):
        link.broadcast(torch.ones(1), lambda: None)


def test_a_link_that_is_dropped_while_a_message_is_queued_keeps_no_group() -> None:
    """Queueing lets other threads run; a work holds its group, and by it the connections."""
    link = alone()
    real, works = link._group, []

    class Dropping:
        def broadcast(self, *args: object) -> object:
            link.abort()
            works.append(weakref.ref(work := real.broadcast(*args)))
            return work

    link._group = Dropping()
    with pytest.raises(RuntimeError, match="dropped") as caught:
        link.broadcast(torch.ones(1), lambda: None)
    assert works[0]() is None and caught.value is not None


def test_a_group_that_was_dropped_is_a_typed_error() -> None:
    group = SenderGroup("g", world_size=1, backend="gloo", timeout_s=60.0)
    group.connect()
    work = group.broadcast(torch.ones(1))
    work.work = _Work(group.abort)
    with pytest.raises(GroupError, match="dropped"):
        group.wait(work, time.monotonic() + 60)
    for call in (lambda: group.wait(work, 0.0), lambda: group.broadcast(torch.ones(1))):
        with pytest.raises(GroupError, match="form it again") as caught:
            call()
        assert caught.value.field == "g"
    group.close()
