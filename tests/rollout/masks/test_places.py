"""Where masks stand in the ranks' table: whatever is evicted, every row has the mask it needs."""

from __future__ import annotations

import random

import numpy as np
import pytest

from rollout.masks import places as places_
from rollout.masks.base import KnownMask
from rollout.masks.places import MaskPlaces
from tests.helpers.sent_masks import SentMasks

VOCAB, ROWS = 40, 6


def mask(number: int, *, sound: bool = True) -> KnownMask:
    return KnownMask(np.array([number, 1], np.uint32), sound=sound)


def small(monkeypatch: pytest.MonkeyPatch) -> MaskPlaces:
    """Room for three masks beside one a row."""
    monkeypatch.setattr(places_, "_KEPT_BYTES", 3 * 8)
    return MaskPlaces(VOCAB, ROWS)


def test_every_row_has_its_mask_and_the_table_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    places, rank = small(monkeypatch), SentMasks()
    known = [mask(number) for number in range(14)]
    highest = 0
    for step in range(400):
        rows = sorted(rng.sample(range(20), rng.randint(0, ROWS)))
        masks = [
            rng.choice(known) if rng.random() < 0.7 else mask(100 + step, sound=False) for _ in rows
        ]
        if rng.random() < 0.05:
            # The ranks may have lost any frame.
            places.forget()
            rank = SentMasks()
        frame = places.frame(step, rows, masks)
        found = rank.enter(frame)
        assert frame.step == step and list(found) == rows
        for row, own in zip(rows, masks, strict=True):
            assert own.bits is not None and found[row].tolist() == own.bits.tolist()
        highest = max(highest, *frame.places.tolist(), 0)
    assert highest == ROWS + 3 - 1


def test_what_may_come_again_is_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    places, rank = small(monkeypatch), SentMasks()
    one, two, once = mask(1), mask(2), mask(3, sound=False)
    assert len(places.frame(0, [0, 1, 2], [one, two, one]).bits) == 2
    frame = places.frame(1, [0, 1, 2, 3], [two, one, once, two])
    assert frame.bits.tolist() == [[3, 1]] and frame.places[0] == frame.places[3]
    assert len(places.frame(2, [0], [once]).bits) == 1
    places.forget()
    rank.enter(places.frame(3, [0, 1], [one, two]))
