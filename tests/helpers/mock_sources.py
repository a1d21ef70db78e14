"""The tables of a rank that say what drafts are copied from, checked against what they may hold."""

from __future__ import annotations

from collections.abc import Callable

from engine.protocol import DraftSources


class MockSources:
    """Sources of each slot, and the texts of the history.

    A segment is its tokens and the prompt that they went on from; what is overwritten is gone.
    """

    def __init__(self) -> None:
        self.num_live = self.num_segments = 0
        """Sources that rows were seen with, of each kind."""
        self._table: dict[tuple[int, int], int] = {}
        self._history: dict[int, int] = {}
        self._segments: dict[int, tuple[int, list[int], list[int]]] = {}

    def apply(
        self, changes: DraftSources, tokens: Callable[[int], tuple[list[int], list[int]]]
    ) -> None:
        """Take over what changed. tokens: those of the sequence in a slot, and of its prompt."""
        for write in changes.writes:
            known, prompt = tokens(write.slot)
            assert 0 <= write.start < write.stop <= len(known), "a text that nobody knows"
            assert write.stop > len(prompt), "a text without outputs"
            text = known[write.start : write.stop]
            self._history.update(enumerate(text, write.at))
            self._segments[write.segment] = (write.at, text, prompt)
        for slot, column, source in zip(changes.slots, changes.columns, changes.ids, strict=True):
            self._table[int(slot), int(column)] = int(source)

    def check(self, slot: int, tokens: Callable[[int], tuple[list[int], list[int]]]) -> None:
        """Assert that the row in `slot` reads texts of its own prompt alone, and each as it was."""
        prompt = tokens(slot)[1]
        for (row, _), source in self._table.items():
            if row != slot or source == -1:
                continue
            if source >= 0:
                assert source != slot, f"slot {slot} drafts from itself"
                assert tokens(source)[1] == prompt, f"slot {source} has another prompt"
                self.num_live += 1
                continue
            at, text, of = self._segments[-2 - source]
            assert of == prompt, f"segment {-2 - source} is of another prompt"
            found = [self._history[at + i] for i in range(len(text))]
            assert found == text, f"segment {-2 - source} was overwritten"
            self.num_segments += 1
