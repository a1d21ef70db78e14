"""Where the outputs of one HTTP call wait until its handler takes them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable

import msgspec

from engine.errors import EngineDead, InvalidRequest
from engine.protocol import Abort, Command, RequestOutput
from rollout.requests.outputs import coalesced
from rollout.requests.sample_ids import of_sample, shown

_MOST_OUTPUTS = 64
"""Kept one by one of what waits; an object a token would be most of its memory."""


class Mailbox:
    """Outputs of the sequences `rids`, in order of arrival. Of a reader that is slow, what waits is
    joined, so that it takes no more than its tokens do.

    open: ids whose final output has not come.
    """

    def __init__(self, rids: Iterable[str]) -> None:
        self.open = set(rids)
        self._outputs: list[RequestOutput] = []
        self._most = _MOST_OUTPUTS
        self._waiter: asyncio.Future[None] | None = None
        self._error: EngineDead | None = None

    def put(self, output: RequestOutput) -> None:
        """Add an output."""
        if output.finish is not None:
            self.open.discard(output.rid)
        self._outputs.append(output)
        if len(self._outputs) >= self._most:
            self._outputs = coalesced(self._outputs)
            self._most = _MOST_OUTPUTS + 2 * len(self._outputs)
        self._wake()

    def fail(self, error: EngineDead) -> None:
        """No more outputs will come."""
        self._error = error
        self._wake()

    def check(self) -> None:
        """Raise EngineDead once the engine is gone."""
        if self._error is not None:
            raise self._error.copy()

    async def take(self) -> list[RequestOutput]:
        """All outputs that came since the last call; waits for the first. Raises EngineDead
        once the engine is gone and everything it sent is taken."""
        while not self._outputs:
            self.check()
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        outputs, self._outputs = self._outputs, []
        return outputs

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class Mailboxes:
    """The mailboxes of all open calls by request id: every id that the engine was sent, or is
    going to be sent, until its final output has come or its call was dropped."""

    def __init__(self) -> None:
        self._boxes: dict[str, Mailbox] = {}
        self._dropped: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._boxes)

    def open(self, rids: list[str]) -> Mailbox:
        """One mailbox for `rids`. Raises InvalidRequest (`rid`), having changed nothing, if an
        id comes twice or is in use."""
        self.check_free(rids)
        box = Mailbox(rids)
        self._boxes.update((rid, box) for rid in rids)
        return box

    def check_free(self, rids: list[str]) -> None:
        """Raise InvalidRequest (`rid`) if an id comes twice or is in use."""
        own = set(rids)
        used = own & self._boxes.keys()
        if used or len(own) < len(rids):
            name = min(used) if used else Counter(rids).most_common(1)[0][0]
            raise InvalidRequest(f"rid {shown(name)!r} is already in use", field="rid")

    def cancel(self, box: Mailbox) -> None:
        """Forget a mailbox none of whose requests reached the engine."""
        for rid in box.open:
            self._boxes.pop(rid, None)

    def forget(self, box: Mailbox, rids: Iterable[str]) -> None:
        """Forget those requests of a mailbox that did not reach the engine."""
        for rid in rids:
            self._boxes.pop(rid, None)
            box.open.discard(rid)

    def resolved(self, command: Command) -> Command:
        """`command`; an Abort of the request that replies show as `rid` names the id that it has.

        Some requests wait in the server and some in the engine, so only here is it known whether
        a name is a request's own or stands for another's sample.
        """
        if isinstance(command, Abort) and command.rid:
            for rid in (command.rid, of_sample(command.rid)):
                if rid in self._boxes:
                    return msgspec.structs.replace(command, rid="", rids=[rid, *command.rids])
        return command

    def drop(self, rids: Iterable[str]) -> None:
        """Nobody reads what still comes for these ids, whose requests the engine has. The ids
        are free again at once: what the engine still says of the old requests is told apart
        from outputs of new ones by its order."""
        for rid in rids:
            if self._boxes.pop(rid, None) is not None:
                self._dropped[rid] += 1

    def deliver(self, output: RequestOutput) -> None:
        """Put an output where it belongs."""
        rid = output.rid
        if self._dropped[rid] if self._dropped else 0:
            if output.finish is not None:
                self._dropped[rid] -= 1
                if not self._dropped[rid]:
                    del self._dropped[rid]
            return
        box = self._boxes.get(rid)
        if box is None:
            return
        if output.finish is not None:
            del self._boxes[rid]
        box.put(output)

    def end(self, output: RequestOutput) -> None:
        """Put the only output of a request that the engine never got. What it still says of an
        older request of that id is told apart as before."""
        box = self._boxes.pop(output.rid, None)
        if box is not None:
            box.put(output)

    def fail(self, error: EngineDead) -> None:
        """No output will come any more for anybody."""
        for box in set(self._boxes.values()):
            box.fail(error)
        self._boxes.clear()
        self._dropped.clear()
