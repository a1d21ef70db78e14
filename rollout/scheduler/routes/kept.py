"""The routes of one sequence, as far as they were read.

Legend: P positions, L layers with experts, K experts of a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from engine.protocol import ExpertFacts, Request, RouteArray


@dataclass(eq=False)
class _Part:
    """Positions [start, stop); routes_PLK: None until they came."""

    start: int
    stop: int
    routes_PLK: RouteArray | None = None


@dataclass(eq=False)
class KeptRoutes:
    """What a sequence returns in the end, from position `start` on.

    Its pages are read when it leaves them, by a retraction too: the step that computes a position
    again, maybe with other weights, is not the one that sampled the token behind it. So a position
    is read once, and what its pages hold later does not matter.
    """

    start: int
    _parts: list[_Part] = field(default_factory=list)

    @property
    def end(self) -> int:
        """The first position that is not read yet."""
        return self._parts[-1].stop if self._parts else self.start

    @property
    def pending(self) -> bool:
        """Whether something that is being read has not come."""
        return any(part.routes_PLK is None for part in self._parts)

    def reading(self, stop: int) -> int:
        """Positions [end, `stop`) are read from now on; the first of them."""
        first = self.end
        self._parts.append(_Part(first, stop))
        return first

    @property
    def num_awaited(self) -> int:
        """Positions of the oldest read that is pending."""
        part = next(part for part in self._parts if part.routes_PLK is None)
        return part.stop - part.start

    def arrived(self, routes_PLK: RouteArray) -> None:
        """Take what came of the oldest read that is pending."""
        part = next(part for part in self._parts if part.routes_PLK is None)
        part.routes_PLK = routes_PLK

    def own(self) -> None:
        """Copy what came: it is part of what a step brought for all, which may go then."""
        for part in self._parts:
            if part.routes_PLK is not None and part.routes_PLK.base is not None:
                part.routes_PLK = part.routes_PLK.copy()

    def before(self, stop: int, facts: ExpertFacts) -> RouteArray:
        """Routes of all layers of positions [start, `stop`), absent where nothing was read."""
        pieces, at = [], self.start
        for part in self._parts:
            assert part.routes_PLK is not None, "routes have not come"
            pieces.append(part.routes_PLK[: max(stop - at, 0)])
            at += len(pieces[-1])
        if at < stop or not pieces:
            pieces.append(facts.absent(max(stop - at, 0)))
        return facts.spread(np.concatenate(pieces))


def kept_routes(request: Request) -> KeptRoutes | None:
    """Where the routes of a request's sequence are kept; None if it does not want them."""
    return KeptRoutes(request.routed_experts_start_len) if request.return_routed_experts else None
