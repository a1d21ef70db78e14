"""What an update does to each request, as its `kv_policy` says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from rollout.scheduler.planning.preempt import Preemption
from rollout.scheduler.planning.queue import WaitingQueue
from rollout.scheduler.running import RunningSet
from rollout.scheduler.sequence import Sequence


@dataclass(frozen=True)
class Treated:
    """restarted: sequences that took the place of those of the same request, and wait.
    stuck: streams and continued requests that would have to start again and cannot; nothing was
    done to them."""

    restarted: list[Sequence] = field(default_factory=list)
    stuck: list[Sequence] = field(default_factory=list)


class KvPolicies:
    """Applies the policies between two steps, before the new version serves.

    keep leaves a request as it is. recompute drops its KV; its tokens and logprobs stay. fresh
    drops both. KV that is dropped is not cached: it belongs to weights that are gone.
    """

    def __init__(self, running: RunningSet, queue: WaitingQueue, preemption: Preemption) -> None:
        self._running = running
        self._queue = queue
        self._preemption = preemption

    def apply(self, sequences: Iterable[Sequence], step: int) -> Treated:
        """Treat every request there is. step: the one to be planned next."""
        treated = Treated()
        for sequence in sequences:
            policy = sequence.request.kv_policy
            if policy == "keep":
                continue
            if policy == "fresh" and _was_returned(sequence):
                treated.stuck.append(sequence)
                continue
            if sequence.slot >= 0:
                self._preemption.retract(sequence, step, keep_kv=False)
            if policy == "fresh" and _has_results(sequence):
                treated.restarted.append(self._restart(sequence))
        return treated

    def _restart(self, sequence: Sequence) -> Sequence:
        fresh = sequence.restarted()
        self._queue.remove(sequence)
        self._queue.push(fresh)
        return fresh


def _was_returned(sequence: Sequence) -> bool:
    return sequence.num_emitted > 0 or sequence.prompt_emitted


def _has_results(sequence: Sequence) -> bool:
    return len(sequence.tokens) > sequence.prompt_len or bool(sequence.prompt_parts)
