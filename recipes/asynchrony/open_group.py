"""A group under way: its requests, and what has come of them so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import msgspec
import numpy as np

from engine.protocol import Request, RequestOutput
from recipes.types import Problem, UnfinishedGroup
from rollout.offline import join_outputs


@dataclass(kw_only=True)
class OpenGroup:
    """position, seed, index, problem, outputs: as in `UnfinishedGroup`. requests: of its replies,
    as they are asked from the beginning."""

    position: int
    seed: int
    index: int
    problem: Problem
    requests: Sequence[Request]
    outputs: dict[str, RequestOutput] = field(default_factory=dict)

    @classmethod
    def of(cls, group: UnfinishedGroup, requests: Sequence[Request]) -> Self:
        """A group that goes on. requests: of its replies."""
        return cls(
            position=group.position,
            seed=group.seed,
            index=group.index,
            problem=group.problem,
            requests=requests,
            outputs=dict(group.outputs),
        )

    def wanted(self) -> list[Request]:
        """The requests whose replies are not whole; one that has begun goes on with its tokens."""
        open_requests = [r for r in self.requests if not _is_whole(self.outputs.get(r.rid))]
        return [_continued(r, self.outputs.get(r.rid)) for r in open_requests]

    def take(self, output: RequestOutput) -> None:
        """Take in the final output of one of `wanted`, or what a withdrawn one had."""
        before = self.outputs.get(output.rid)
        if before is not None and len(before.token_ids):
            output = join_outputs([before, output])
        self.outputs[output.rid] = output

    @property
    def is_whole(self) -> bool:
        """Whether every reply is over."""
        return all(_is_whole(self.outputs.get(request.rid)) for request in self.requests)

    def replies(self) -> list[tuple[Request, RequestOutput]]:
        """All replies, in the order of the requests."""
        return [(request, self.outputs[request.rid]) for request in self.requests]

    def unfinished(self) -> UnfinishedGroup:
        """What a checkpoint keeps of it."""
        return UnfinishedGroup(
            position=self.position,
            seed=self.seed,
            index=self.index,
            problem=self.problem,
            outputs=dict(self.outputs),
        )


def was_withdrawn(output: RequestOutput) -> bool:
    """Whether a request ended because its caller took it back: it may go on."""
    finish = output.finish
    return finish is not None and finish.type == "abort" and not finish.error


def _is_whole(output: RequestOutput | None) -> bool:
    return output is not None and not was_withdrawn(output)


def _continued(request: Request, output: RequestOutput | None) -> Request:
    if output is None or not len(output.token_ids):
        return request
    return msgspec.structs.replace(request, output_ids=output.token_ids.astype(np.int32))
