"""Keeps the engines fed, and has a batch ready for the trainer: the oldest groups that are whole.

A group's way: a round starts, its replies come from the stream (`open_group`), they are graded
(`grade_queue`), the group waits its turn (`rollout_buffer`). `pacing` says when a round starts and
when a batch is taken.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import msgspec

from engine.protocol import Request, RequestOutput
from recipes.actors.actor import raise_if_failed
from recipes.asynchrony.background_grades import BackgroundGrades
from recipes.asynchrony.grade_queue import GradeQueue, InlineGrades
from recipes.asynchrony.open_group import OpenGroup, was_withdrawn
from recipes.asynchrony.pacing import Pacing
from recipes.asynchrony.reply_stream import ReplyStream
from recipes.asynchrony.rollout_buffer import RolloutBuffer
from recipes.collecting.collect import requests_of, score
from recipes.run.run import Run
from recipes.types import Group, Problem
from rollout.offline import derive_seed


class Feeder:
    """The rollouts of an asynchronous run, from the problem to the batch.

    run: its surplus and unfinished groups, of a checkpoint, go on. stream: to the engines.
    in_background: grade beside the loop.
    """

    def __init__(self, run: Run, stream: ReplyStream, *, in_background: bool) -> None:
        options, algorithm = run.options, run.algorithm
        self._run = run
        self._stream = stream
        self._strict = options.asynchrony.strict_age
        self._pacing = Pacing(
            groups_per_step=options.rollout.prompts_per_step,
            max_staleness=options.asynchrony.max_staleness,
            resamples=algorithm.max_resamples * algorithm.dynamic_sampling,
        )
        self._grades: GradeQueue = (
            BackgroundGrades(functools.partial(_score, run))
            if in_background
            else InlineGrades(functools.partial(_score_in_turn, run))
        )
        self._buffer = RolloutBuffer(run.surplus)
        self._open: dict[int, OpenGroup] = {}
        self._group_of: dict[str, OpenGroup] = {}
        self._rounds = 0
        self._num_filtered = 0
        self._sampled: list[Group] = []
        for each in run.unfinished:
            requests = self._requests([each.problem], each.seed, each.index)
            self._open[each.position] = OpenGroup.of(each, requests)
        self.resume()

    def top_up(self) -> None:
        """Start as many rounds as the pacing allows."""
        while self._pacing.starts_round(**self._counts()):
            self._start_round()

    def advance(self) -> None:
        """Take in what the engines have finished, waiting a moment for it."""
        self._take(self._stream.poll() if self._group_of else [])

    def during_update(self) -> None:
        """Take in what the engines did while the trainer computed."""
        self._take(self._stream.during_update())

    def trains(self) -> bool:
        """Whether a batch is to be trained now."""
        return self._pacing.trains(**{**self._counts(), "ready": self._num_in_turn()})

    def pop_batch(self) -> list[Group]:
        """The batch. What is ready beyond it stays. Where no group has anything to teach, it is of
        those that were dropped."""
        num = self._pacing.groups_per_step
        groups = self._buffer.pop_oldest(num, before=self._oldest_open())
        self._rounds = 0
        self._run.surplus = self._buffer.groups()
        return groups or _by_position(self._sampled)[:num]

    def take_sampled(self) -> list[Group]:
        """Every group that has been graded since the last call, oldest first."""
        sampled, self._sampled = self._sampled, []
        return _by_position(sampled)

    def set_aside(self) -> None:
        """Take all that is under way from the engines, with the tokens it has, and write down on
        the run what a checkpoint has to keep."""
        self._take(self._stream.withdraw())
        self._group_of.clear()
        while self._grades.num_open:
            self._take([])
        self._run.surplus = self._buffer.groups()
        self._run.unfinished = [self._open[p].unfinished() for p in sorted(self._open)]

    def resume(self) -> None:
        """Undo `set_aside`: replies go on behind the tokens that they have."""
        requests: list[Request] = []
        for position in sorted(self._open):
            wanted = self._open[position].wanted()
            self._group_of.update((request.rid, self._open[position]) for request in wanted)
            requests += wanted
        self._stream.submit(requests)

    def figures(self) -> dict[str, float]:
        """What waits where, what was dropped since the last call, and who waited for whom."""
        filtered, self._num_filtered = self._num_filtered, 0
        return {
            "async/groups_in_flight": float(len(self._open)),
            "async/groups_ready": float(self._buffer.count()),
            "async/groups_filtered": float(filtered),
            **self._stream.waits(),
        }

    def close(self) -> None:
        """Stop grading. Idempotent."""
        self._grades.close()

    def _start_round(self) -> None:
        run = self._run
        position = run.progress.position
        seed = derive_seed(run.options.seed, "rollout", position)
        problems, first = run.next_problems()
        requests = self._requests(problems, seed, first)
        num = len(requests) // max(len(problems), 1)
        for place, problem in enumerate(problems):
            made = OpenGroup(
                position=position + first + place,
                seed=seed,
                index=first + place,
                problem=problem,
                requests=requests[place * num : (place + 1) * num],
            )
            self._open[made.position] = made
            self._group_of.update((request.rid, made) for request in made.requests)
        self._rounds += 1
        self._stream.submit(requests)

    def _requests(self, problems: Sequence[Problem], seed: int, first: int) -> list[Request]:
        run = self._run
        requests = requests_of(
            run.prompts,
            problems,
            run.sampling,
            samples=run.options.rollout.samples,
            greedy=run.algorithm.needs_greedy,
            seed=seed,
            first=first,
            routes=run.options.routing.routing_replay,
            entropy=run.options.keep_entropy,
        )
        policy = run.options.asynchrony.stale_kv
        return [msgspec.structs.replace(request, kv_policy=policy) for request in requests]

    def _take(self, outputs: Sequence[RequestOutput]) -> None:
        """Take in final outputs, and the grades that there are."""
        for output in outputs:
            group = self._group_of.pop(output.rid)
            if not was_withdrawn(output):
                raise_if_failed(output)
            group.take(output)
            if group.is_whole:
                self._grades.put(group)
        for graded in self._grades.collect(wait_for_one=not self._group_of):
            del self._open[graded.position]
            self._sampled.append(graded)
            if graded.mixed or not self._run.algorithm.dynamic_sampling:
                self._buffer.put(graded)
            else:
                self._num_filtered += 1

    def _counts(self) -> dict[str, int]:
        ready = self._buffer.count()
        return {"in_flight": len(self._open), "ready": ready, "rounds": self._rounds}

    def _num_in_turn(self) -> int:
        """Groups that may be trained now."""
        return self._buffer.count(self._oldest_open())

    def _oldest_open(self) -> int | None:
        """Where age is strict, the position that no younger group may go before."""
        return min(self._open, default=None) if self._strict else None


def _by_position(groups: Sequence[Group]) -> list[Group]:
    return sorted(groups, key=lambda group: group.position)


def _score_in_turn(run: Run, group: OpenGroup) -> Group:
    with run.ledger.phase("score"):
        return _score(run, group)


def _score(run: Run, group: OpenGroup) -> Group:
    algorithm = run.algorithm
    (graded,) = score(
        run.prompts,
        [group.problem],
        group.replies(),
        overlong_buffer=algorithm.overlong_buffer,
        greedy=algorithm.needs_greedy,
        grader=run.grading,
        shelf=run.shelf,
    )
    return dataclasses.replace(graded, position=group.position)
