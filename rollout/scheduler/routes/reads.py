"""Which routes the next step reads, and the outputs that wait for them."""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec.structs import replace

from engine.protocol import ExpertFacts, IntArray, RequestOutput, RouteArray, RouteRead
from rollout.scheduler.routes.kept import KeptRoutes
from rollout.scheduler.sequence import Sequence


@dataclass(frozen=True)
class _Waiting:
    """The last output of a sequence whose routes before position `stop` are on their way."""

    output: RequestOutput
    kept: KeptRoutes
    stop: int


@dataclass
class RouteReads:
    """Reads of one scheduler. A page that a sequence leaves may be written by the next step that is
    planned; so that step reads it first, and its result brings what it read.

    facts: None of a dense model, where nothing is ever read.
    """

    facts: ExpertFacts | None
    page_size: int
    _next: list[tuple[RouteRead, KeptRoutes]] = field(default_factory=list)
    _waiting: dict[str, _Waiting] = field(default_factory=dict)

    @property
    def wanted(self) -> bool:
        """Whether the next step has something to read."""
        return bool(self._next)

    @property
    def waiting(self) -> bool:
        """Whether an output waits for what is read."""
        return bool(self._waiting)

    def waits(self, rid: str) -> bool:
        """Whether the last output of the request waits."""
        return rid in self._waiting

    def leave(self, sequence: Sequence, pages: IntArray, computed: int) -> None:
        """Have what was not read yet of a sequence that is about to leave its pages be read: of
        its `computed` tokens those behind which another one is known. pages: int32, a view."""
        kept = sequence.routes
        stop = min(computed, len(sequence.tokens) - 1)
        if kept is None or stop <= kept.end:
            return
        first = kept.reading(stop)
        size = self.page_size
        first_page = first // size
        read = RouteRead(
            pages=pages[first_page : -(-stop // size)].copy(),
            start=first - first_page * size,
            count=stop - first,
        )
        self._next.append((read, kept))

    def take(self) -> tuple[list[RouteRead], list[KeptRoutes]]:
        """What the step that is planned now reads, and for whom."""
        reads, self._next = self._next, []
        return [read for read, _ in reads], [kept for _, kept in reads]

    def finish(self, sequence: Sequence, output: RequestOutput) -> list[RequestOutput]:
        """The last output of a sequence that holds no pages any more, with its routes; nothing if
        they have not come, and then `arrived` returns it."""
        kept = sequence.routes
        if kept is None:
            return [output]
        waiting = _Waiting(output, kept, len(sequence.tokens) - 1)
        if kept.pending:
            self._waiting[output.rid] = waiting
            return []
        return [self._with_routes(waiting)]

    def arrived(self, keepers: list[KeptRoutes], routes: RouteArray | None) -> list[RequestOutput]:
        """Hand out what a step read; the outputs that waited for it. keepers: as `take` has them.
        routes: as in `StepResult`."""
        if not keepers:
            return []
        assert routes is not None, "a step brought no routes"
        at = 0
        for kept in keepers:
            count = kept.num_awaited
            kept.arrived(routes[at : at + count])
            at += count
        assert at == len(routes), f"{len(routes)} routes came where {at} were read"
        ready = [waiting for waiting in self._waiting.values() if not waiting.kept.pending]
        for waiting in ready:
            del self._waiting[waiting.output.rid]
        outputs = [self._with_routes(waiting) for waiting in ready]
        for kept in keepers:
            kept.own()
        return outputs

    def give_up(self) -> list[RequestOutput]:
        """Forget every read: the pages are not trusted any more. The outputs that waited, without
        routes."""
        outputs = [waiting.output for waiting in self._waiting.values()]
        self._waiting.clear()
        self._next.clear()
        return outputs

    def _with_routes(self, waiting: _Waiting) -> RequestOutput:
        assert self.facts is not None, "a model without experts has no routes"
        return replace(
            waiting.output,
            routed_experts=waiting.kept.before(waiting.stop, self.facts),
            routed_experts_start=waiting.kept.start,
        )
