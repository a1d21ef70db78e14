"""Branches of a state, which go on from it separately."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from engine.errors import InvalidRequest, SlipstreamError
from rollout.programs.concurrently import awaited, together
from rollout.programs.errors import BranchFailed

S = TypeVar("S")
T = TypeVar("T")


class Forks(Generic[S]):
    """The branches, in order. Their requests are in the engine at once, where they share the KV of
    what came before."""

    def __init__(self, branches: Sequence[S], where: str) -> None:
        """where: which fork this is, for errors."""
        self._branches = list(branches)
        self._where = where

    def __len__(self) -> int:
        return len(self._branches)

    def __getitem__(self, index: int) -> S:
        return self._branches[index]

    def __iter__(self) -> Iterator[S]:
        return iter(self._branches)

    async def run(self, step: Callable[..., Awaitable[T]], *columns: Iterable[Any]) -> list[T]:
        """`step(branch, ...)` of every branch, with its own item of each of `columns`; the results
        in order.

        Raises BranchFailed for the first branch whose step raised an error of the tree, once the
        others were ended and their requests aborted; other errors are raised as they are, with a
        note. Raises InvalidRequest (`columns`) for a column of another length.
        """
        listed = [list(column) for column in columns]
        for column in listed:
            if len(column) != len(self):
                raise InvalidRequest(
                    f"a column has {len(column)} items for {len(self)} branches", field="columns"
                )
        rows = zip(self._branches, *listed, strict=True)
        return await together([awaited(step, *row) for row in rows], self._told)

    def _told(self, place: int, error: BaseException) -> BaseException:
        named = f"branch {place} of {self._where}"
        if not isinstance(error, SlipstreamError):
            error.add_note(f"in {named}")
            return error
        field = f" ({error.field})" if error.field else ""
        kind = "" if isinstance(error, BranchFailed) else f"{type(error).__name__}{field}: "
        return BranchFailed(f"{named}: {kind}{error.message}", field=named)
