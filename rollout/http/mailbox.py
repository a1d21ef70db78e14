"""Where the outputs of one HTTP call wait until its handler takes them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from engine.errors import EngineDead
from engine.protocol import RequestOutput


class Mailbox:
    """Outputs of the sequences `rids`, in order of arrival.

    open: ids whose final output has not come.
    """

    def __init__(self, rids: Iterable[str]) -> None:
        self.open = set(rids)
        self._outputs: list[RequestOutput] = []
        self._arrived = asyncio.Event()
        self._error: EngineDead | None = None

    def put(self, output: RequestOutput) -> None:
        """Add an output."""
        if output.finish is not None:
            self.open.discard(output.rid)
        self._outputs.append(output)
        self._arrived.set()

    def fail(self, error: EngineDead) -> None:
        """No more outputs will come."""
        self._error = error
        self._arrived.set()

    async def take(self) -> list[RequestOutput]:
        """All outputs that came since the last call; waits for the first. Raises EngineDead
        once the engine is gone and everything it sent is taken."""
        while not self._outputs:
            if self._error is not None:
                raise EngineDead(self._error.message, field=self._error.field)
            self._arrived.clear()
            await self._arrived.wait()
        outputs, self._outputs = self._outputs, []
        return outputs
