"""An engine as the target of updates, on which commands fail when a test says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.errors import SlipstreamError
from engine.protocol import Command, Reply

Fault = Callable[[], SlipstreamError]


class FaultyTarget:
    """Passes commands to `engine`, which a test may exchange as a restart does.

    refused: errors by kind of command, raised before the engine sees it. lost: the same, raised
    after the engine obeyed, as when the answer is lost; each is used `times` times.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.seen: list[str] = []
        self._faults: dict[str, tuple[SlipstreamError, int, bool]] = {}

    def fail(
        self, kind: type, error: SlipstreamError, *, times: int = 1, obeys: bool = False
    ) -> None:
        """The next `times` commands of a kind raise `error`. obeys: the engine does as told."""
        self._faults[kind.__name__] = (error, times, obeys)

    def restart(self, engine: Any) -> None:
        """`engine` takes the place of the one that was there, as its server starts it again."""
        self.engine.close()
        self.engine = engine

    def heal(self) -> None:
        """No command fails any more."""
        self._faults.clear()

    def send(self, command: Command) -> Reply:
        """See `UpdateTarget`."""
        kind = type(command).__name__
        self.seen.append(kind)
        error, times, obeys = self._faults.get(kind, (None, 0, False))
        if error is None or times == 0:
            reply: Reply = self.engine.send(command)
            return reply
        self._faults[kind] = (error, times - 1, obeys)
        if obeys:
            self.engine.send(command)
        raise error
