"""Graders that run beside the run: in processes of their own, several replies at once.

What grades a reply may take forever, fill the memory or crash: computer algebra on what a model
wrote, or a user's own function. Here such a reply has a `Failed` and costs no other reply anything.
Grades come in the order asked and do not depend on the number of processes. A reply's time begins
when its process takes it up, however many wait.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from recipes.rewards.base import Failed, Grade
from recipes.rewards.graders.grader_main import GraderLimits
from recipes.rewards.graders.worker import GraderSpec, Parameters, Worker

LIMITS = GraderLimits(cpu_s=1.0, wall_s=30.0, memory_bytes=4 << 30)
MOST_PROCESSES = 8


@dataclass(frozen=True, kw_only=True)
class GraderCall:
    """The arguments of a grader for one reply; JSON's types. cpu_s: a shorter limit than the
    pool's, of processor time."""

    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    cpu_s: float | None = None


class GraderPool:
    """Processes of one grader, which start when they are needed, or before by `start`.

    num_processes: None takes one a core, at most `MOST_PROCESSES`.
    """

    def __init__(
        self, spec: GraderSpec, *, num_processes: int | None = None, limits: GraderLimits = LIMITS
    ) -> None:
        num = num_processes or min(os.cpu_count() or 1, MOST_PROCESSES)
        self._cpu_s = limits.cpu_s
        self._workers = [Worker(spec, limits) for _ in range(num)]
        self._free: asyncio.LifoQueue[Worker] = asyncio.LifoQueue()
        for worker in reversed(self._workers):
            self._free.put_nowait(worker)
        self._threads = ThreadPoolExecutor(num, thread_name_prefix="grader")

    def start(self) -> None:
        """Start the processes without waiting for them: they import while others work."""
        for worker in self._workers:
            worker.launch()

    def parameters(self) -> Parameters:
        """What the grader takes; waits for a process that has loaded it. Raises InvalidRequest if
        it cannot be loaded."""
        return self._workers[0].parameters()

    async def grade(self, calls: Sequence[GraderCall]) -> list[Grade]:
        """One grade a call, in order. Raises InvalidRequest if the grader cannot be loaded."""
        grades: list[Grade] = [Failed(kind="died", reason="not graded")] * len(calls)
        waiting = iter(enumerate(calls))
        num = min(len(self._workers), len(calls))
        tasks = [asyncio.create_task(self._serve(waiting, grades)) for _ in range(num)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return grades

    async def _serve(self, waiting: Iterator[tuple[int, GraderCall]], grades: list[Grade]) -> None:
        loop = asyncio.get_running_loop()
        for index, call in waiting:
            worker = await self._free.get()
            try:
                job: dict[str, Any] = {"arguments": call.arguments, "keywords": dict(call.keywords)}
                job["cpu_s"] = self._cpu_s if call.cpu_s is None else call.cpu_s
                grades[index] = await loop.run_in_executor(self._threads, worker.grade, job)
            finally:
                self._free.put_nowait(worker)

    async def close(self) -> None:
        """As `end`, for an event loop."""
        await asyncio.to_thread(self.end)

    def end(self) -> None:
        """End the processes, with all that they have started, and wait for that. Idempotent."""
        for worker in self._workers:
            worker.end()
        for worker in self._workers:
            worker.close()
        self._threads.shutdown()
