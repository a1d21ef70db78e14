"""The engine of this process, fed while it runs: it advances only when it is told to, so that an
asynchronous run is a function of its seed."""

from __future__ import annotations

from collections.abc import Sequence

from engine.protocol import Abort, Request, RequestOutput
from rollout.replica.base import Replica


class InlineStream:
    """A `ReplyStream` over a replica of this process. Time is counted in its steps.

    steps_per_update: engine steps that one update lasts.
    """

    def __init__(self, replica: Replica, *, steps_per_update: int) -> None:
        self._replica = replica
        self._steps_per_update = steps_per_update
        self._open: dict[str, None] = {}
        self._trainer_waited = self._engine_waited = 0

    def submit(self, requests: Sequence[Request]) -> None:
        """See `ReplyStream`."""
        self._open.update(dict.fromkeys(request.rid for request in requests))
        self._replica.submit(requests)

    def poll(self) -> list[RequestOutput]:
        """See `ReplyStream`: one step."""
        self._trainer_waited += 1
        return self._step()

    def during_update(self) -> list[RequestOutput]:
        """See `ReplyStream`: `steps_per_update` steps, as long as there is something to do."""
        outputs: list[RequestOutput] = []
        for step in range(self._steps_per_update):
            if not self._open:
                self._engine_waited += self._steps_per_update - step
                break
            outputs += self._step()
        return outputs

    def withdraw(self) -> list[RequestOutput]:
        """See `ReplyStream`."""
        outputs: list[RequestOutput] = []
        if self._open:
            self._replica.send(Abort(rids=list(self._open), message="withdrawn, to go on later"))
        while self._open:
            outputs += self._step()
        return outputs

    def waits(self) -> dict[str, float]:
        """See `ReplyStream`."""
        trainer, engine = float(self._trainer_waited), float(self._engine_waited)
        self._trainer_waited = self._engine_waited = 0
        return {"async/trainer_wait_steps": trainer, "async/engine_wait_steps": engine}

    def _step(self) -> list[RequestOutput]:
        outputs = [output for output in self._replica.step() if output.finish is not None]
        for output in outputs:
            self._open.pop(output.rid, None)
        return outputs
