"""Takes sequences out of where they are, for good, and makes their last outputs."""

from __future__ import annotations

from engine.protocol import FinishReason, RequestOutput
from rollout.scheduler.emit import final_output
from rollout.scheduler.ending.finish import NOT_FINITE
from rollout.scheduler.planning.queue import WaitingQueue
from rollout.scheduler.planning.queue_groups import QueueGroups
from rollout.scheduler.running import RunningSet
from rollout.scheduler.sequence import Sequence


class Endings:
    """The ends of one scheduler's requests.

    The last output of a request that wants its routes is not there at once: `RunningSet.routes`
    returns it when they have come. drafts: as in `emit.make_output`.
    """

    def __init__(
        self,
        requests: dict[str, Sequence],
        groups: QueueGroups,
        running: RunningSet,
        queue: WaitingQueue,
        *,
        drafts: bool,
    ) -> None:
        self._requests = requests
        self._groups = groups
        self._running = running
        self._queue = queue
        self._drafts = drafts

    def each(
        self, sequences: list[Sequence], finish: FinishReason, *, step: int, keep_kv: bool = True
    ) -> list[RequestOutput]:
        """End each of `sequences`. step: the one to be planned next. keep_kv: leave what they
        computed to the prefix cache."""
        outputs: list[RequestOutput] = []
        if not keep_kv:
            running = [sequence for sequence in sequences if sequence.slot >= 0]
            waiting = [sequence for sequence in sequences if sequence.slot < 0]
            self._running.stop_many(running)
            self._queue.remove_many(waiting)
            for sequence in sequences:
                outputs += self._close(sequence, finish)
            return outputs
        # From the back: taking from the front of a long queue moves all of it.
        for sequence in reversed(sequences):
            outputs += self.one(sequence, finish, step=step)
        return outputs[::-1]

    def one(self, sequence: Sequence, finish: FinishReason, *, step: int) -> list[RequestOutput]:
        """End one sequence; step: as in `each`."""
        if sequence.slot >= 0:
            self._running.stop(sequence, step=step)
        else:
            self._queue.remove(sequence)
        return self._close(sequence, finish)

    def broken(self, sequence: Sequence, *, step: int) -> list[RequestOutput]:
        """End one whose numbers were not finite."""
        self._running.stop_broken(sequence, step=step)
        return self._close(sequence, NOT_FINITE)

    def at(
        self, sequence: Sequence, num_tokens: int, finish: FinishReason, *, step: int
    ) -> list[RequestOutput]:
        """End one at `num_tokens` output tokens, what came behind them being dropped."""
        size = sequence.prompt_len + max(0, num_tokens)
        if sequence.slot >= 0:
            table, slot = self._running.table, sequence.slot
            table.num_tokens[slot] = min(size, int(table.num_tokens[slot]))
        sequence.tokens = sequence.tokens[:size]
        sequence.logprobs = sequence.logprobs[: size - sequence.prompt_len]
        sequence.entropies = sequence.entropies[: size - sequence.prompt_len]
        return self.one(sequence, finish, step=step)

    def _close(self, sequence: Sequence, finish: FinishReason) -> list[RequestOutput]:
        """Forget a sequence that neither runs nor waits any more; its last output."""
        del self._requests[sequence.request.rid]
        self._groups.leave(sequence.request.group)
        output = final_output(sequence, finish, drafts=self._drafts)
        return self._running.routes.finish(sequence, output)
