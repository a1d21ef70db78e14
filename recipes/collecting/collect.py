"""Rollouts and rewards: problems in, groups of scored trajectories out."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from engine.protocol import Request, RequestOutput, SamplingParams
from recipes.actors.actor import Actor
from recipes.collecting.prompts import Prompts
from recipes.rewards.base import Failed, Grade, Item
from recipes.rewards.grading import Grader, grading_of
from recipes.rewards.shaping import overlong_penalty
from recipes.trainers.route_shelf import RouteShelf
from recipes.types import Group, Problem, Trajectory
from rollout.offline import derive_seed


def requests_of(
    prompts: Prompts,
    problems: Sequence[Problem],
    sampling: SamplingParams,
    *,
    samples: int,
    greedy: bool = False,
    seed: int,
    first: int = 0,
    routes: bool = False,
    entropy: bool = False,
) -> list[Request]:
    """The requests for `samples` replies to each problem, in the order of the problems.

    greedy: one more a problem, behind its samples: the greedy reply.
    seed: of this call; every sample's own is derived from it and its place. first: place of the
    first problem among those that several processes share out. routes: ask for the experts that
    the samples' tokens go to, as an engine with `return_routed_experts` tells them. entropy: ask
    for the entropy behind every token.
    """
    likeliest = msgspec.structs.replace(sampling, temperature=0.0)
    requests: list[Request] = []
    for index, problem in enumerate(problems, start=first):
        prompt_ids = prompts.prompt_ids(problem)
        requests += [
            Request(
                rid=f"{seed:x}-{index}-{sample}",
                prompt_ids=prompt_ids,
                sampling=sampling,
                seed=derive_seed(seed, index, sample),
                group=f"{seed:x}-{index}",
                stop_ids=prompts.stop_ids,
                return_routed_experts=routes,
                entropy=entropy,
            )
            for sample in range(samples)
        ]
        if greedy:
            rid = f"{seed:x}-{index}-greedy"
            asked = {"sampling": likeliest, "return_routed_experts": False, "entropy": False}
            requests.append(msgspec.structs.replace(requests[-1], rid=rid, **asked))
    return requests


def rollout(
    actor: Actor,
    prompts: Prompts,
    problems: Sequence[Problem],
    sampling: SamplingParams,
    *,
    samples: int,
    greedy: bool = False,
    seed: int,
    first: int = 0,
    routes: bool = False,
    entropy: bool = False,
) -> list[tuple[Request, RequestOutput]]:
    """Sample replies to each problem: the pairs of `requests_of`, which takes the same."""
    requests = requests_of(
        prompts,
        problems,
        sampling,
        samples=samples,
        greedy=greedy,
        seed=seed,
        first=first,
        routes=routes,
        entropy=entropy,
    )
    return list(zip(requests, actor.generate(requests), strict=True))


def score(
    prompts: Prompts,
    problems: Sequence[Problem],
    replies: Sequence[tuple[Request, RequestOutput]],
    *,
    overlong_buffer: int = 0,
    greedy: bool = False,
    grader: Grader | None = None,
    shelf: RouteShelf | None = None,
) -> list[Group]:
    """Grade replies and put them in groups, `len(replies) // len(problems)` a problem.

    greedy: the last reply to each problem is the greedy one.
    grader: None is the task's own. A reply that it cannot grade says so in `failed`. shelf: takes
    the routes of replies that have them."""
    samples = len(replies) // max(len(problems), 1)
    items = _items(prompts, problems, replies, samples)
    if grader is None:
        with grading_of(prompts.environment) as own:
            grades = own(items)
    else:
        grades = grader(items)
    trajectories = [
        _trajectory(*reply, item.reply, grade, overlong_buffer, shelf)
        for reply, item, grade in zip(replies, items, grades, strict=True)
    ]
    return [
        _group(problem, trajectories[index * samples : (index + 1) * samples], greedy)
        for index, problem in enumerate(problems)
    ]


def _group(problem: Problem, replies: Sequence[Trajectory], greedy: bool) -> Group:
    if greedy:
        return Group(problem=problem, trajectories=tuple(replies[:-1]), greedy=replies[-1])
    return Group(problem=problem, trajectories=tuple(replies))


def _items(
    prompts: Prompts,
    problems: Sequence[Problem],
    replies: Sequence[tuple[Request, RequestOutput]],
    samples: int,
) -> list[Item]:
    asked = [(problem, prompts.messages(problem)) for problem in problems]
    return [
        Item(
            problem=asked[index // samples][0],
            messages=asked[index // samples][1],
            reply=prompts.reply_text(output.token_ids),
            reply_ids=output.token_ids,
        )
        for index, (_, output) in enumerate(replies)
    ]


def _trajectory(
    request: Request,
    output: RequestOutput,
    text: str,
    grade: Grade,
    overlong_buffer: int,
    shelf: RouteShelf | None,
) -> Trajectory:
    assert output.finish is not None and len(output.token_ids) > 0
    failed = str(grade) if isinstance(grade, Failed) else ""
    correct = 0.0 if isinstance(grade, Failed) else grade
    penalty = overlong_penalty(
        len(output.token_ids), request.sampling.max_new_tokens, overlong_buffer
    )
    routes = output.routed_experts
    return Trajectory(
        prompt_ids=request.prompt_ids,
        response_ids=output.token_ids,
        rollout_logprobs=output.logprobs,
        spans=tuple(output.spans),
        text=text,
        truncated=output.finish.type == "length",
        reward=0.0 if failed else correct + penalty,
        correct=correct,
        failed=failed,
        spec=output.spec,
        routes=None if shelf is None or routes is None else shelf.put(routes),
        entropies=output.entropies,
    )
