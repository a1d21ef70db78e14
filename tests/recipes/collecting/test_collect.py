"""Prompts, rollouts and scores with the fake engine."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest

from engine.protocol import SamplingParams
from recipes.collecting.collect import rollout, score
from recipes.collecting.prompts import Prompts
from recipes.data.chat_style import ChatStyle
from recipes.environments.procedural import largest
from recipes.rewards.base import Failed, Grade, Item
from recipes.rewards.grading import Grader
from recipes.trainers.route_shelf import RouteShelf
from tests.helpers.char_model import VOCAB, CharAddition, char_model, char_tokenizer
from tests.helpers.fake_actor import FakeActor

TASK = CharAddition()
SAMPLING = SamplingParams(max_new_tokens=5, temperature=1.0)


def actor() -> FakeActor:
    return FakeActor(char_model(16, 1), eos_ids=[0])


def prompts() -> Prompts:
    return Prompts(TASK, char_tokenizer(), [0])


def problems() -> list:
    import random

    rng = random.Random(0)
    return [TASK.draw(rng) for _ in range(3)]


def testplain_text_prompts_end_at_the_line() -> None:
    written, problem = prompts(), problems()[0]
    assert written.stop_ids == sorted([0, VOCAB["\n"]])
    assert written.tokenizer.decode(written.prompt_ids(problem).tolist()) == problem.question
    reply = np.array([VOCAB["4"], VOCAB["6"], VOCAB["\n"]], np.int32)
    assert written.reply_text(reply) == "46"
    assert written.reply_text(reply[:2]) == "46"


def test_examples_become_lines_without_a_chat_template() -> None:
    from recipes.collecting.prompts import plain_text

    task = largest()
    text = plain_text(task.messages(task.examples[0]))
    assert text.endswith("largest number: 9, 85, 51? 85\nWhich is the largest number: 62, 14, 37?")


def test_samples_of_a_problem_share_prompt_and_group_but_not_seed() -> None:
    pairs = rollout(actor(), prompts(), problems(), SAMPLING, samples=4, seed=7)
    assert len(pairs) == 12
    requests = [request for request, _ in pairs]
    assert len({r.rid for r in requests}) == len({r.seed for r in requests}) == 12
    assert [r.group for r in requests[:4]] == [requests[0].group] * 4
    assert len({r.group for r in requests}) == 3
    assert all(r.prompt_ids is requests[0].prompt_ids for r in requests[:4])
    again = rollout(actor(), prompts(), problems(), SAMPLING, samples=4, seed=7)
    assert [o.token_ids.tolist() for _, o in pairs] == [o.token_ids.tolist() for _, o in again]


def test_scores_are_the_tasks_own_and_penalties_come_off() -> None:
    given = problems()
    pairs = rollout(actor(), prompts(), given, SAMPLING, samples=4, seed=7)
    groups = score(prompts(), given, pairs, overlong_buffer=2)
    assert [g.problem for g in groups] == given
    for group, first in zip(groups, range(0, 12, 4), strict=True):
        for t, (_, output) in zip(group.trajectories, pairs[first : first + 4], strict=True):
            assert t.correct == TASK.verify(t.text, group.problem)
            penalty = max(0.0, (len(output.token_ids) - 3) / 2)
            assert t.reward == pytest.approx(t.correct - penalty)
            assert t.truncated == (output.finish is not None and output.finish.type == "length")


def fail_on(*texts: str) -> Grader:
    """A grader that cannot grade these replies, or replies to these questions; without any, no
    reply. The others have reward 1."""

    def grader(items: Sequence[Item]) -> list[Grade]:
        failed = Failed(kind="raised", reason="no")
        told = [{item.reply, item.problem.question} for item in items]
        return [failed if not texts or each.intersection(texts) else 1.0 for each in told]

    return grader


def test_what_cannot_be_graded_is_marked_and_has_no_part_in_its_group() -> None:
    given = problems()
    pairs = rollout(actor(), prompts(), given, SAMPLING, samples=4, seed=7)
    bad = prompts().reply_text(pairs[5][1].token_ids)
    groups = score(prompts(), given, pairs, overlong_buffer=2, grader=fail_on(bad))
    failed = [t for group in groups for t in group.trajectories if t.failed]
    assert groups[1].trajectories[1] in failed
    for t in failed:
        assert (t.text, t.reward, t.correct, t.failed) == (bad, 0.0, 0.0, "raised: no")
    assert all(t.correct == 1.0 for group in groups for t in group.graded)


def test_a_grader_sees_the_chat_and_the_ids() -> None:
    given, seen = problems(), []

    def grader(items: Sequence[Item]) -> list[Grade]:
        seen.extend(items)
        return [0.0] * len(items)

    pairs = rollout(actor(), prompts(), given, SAMPLING, samples=2, seed=7)
    score(prompts(), given, pairs, grader=grader)
    assert [item.problem for item in seen] == [each for each in given for _ in range(2)]
    for item, (_, output) in zip(seen, pairs, strict=True):
        assert item.messages == TASK.messages(item.problem)
        assert item.reply_ids is output.token_ids
        assert item.reply == prompts().reply_text(output.token_ids)


def test_a_grader_sees_the_system_message_that_the_model_saw() -> None:
    seen: list[Item] = []

    def grader(items: Sequence[Item]) -> list[Grade]:
        seen.extend(items)
        return [0.0] * len(items)

    led = Prompts(TASK, char_tokenizer(), [0], ChatStyle(system="12"))
    pairs = rollout(actor(), led, problems(), SAMPLING, samples=1, seed=7)
    score(led, problems(), pairs, grader=grader)
    system = {"role": "system", "content": "12"}
    assert [item.messages for item in seen] == [[system, *TASK.messages(p)] for p in problems()]


def test_routes_of_samples_are_put_on_a_shelf_and_those_of_the_greedy_reply_are_not_asked() -> None:
    given, shelf = problems(), RouteShelf()
    pairs = rollout(
        actor(), prompts(), given, SAMPLING, samples=2, greedy=True, seed=7, routes=True
    )
    asked = [request.return_routed_experts for request, _ in pairs]
    assert asked == [True, True, False] * 3
    told = []
    for index, (request, output) in enumerate(pairs):
        num = len(request.prompt_ids) + len(output.token_ids) - 1
        routes = np.full((num, 2, 1), index, np.uint8) if asked[index] else None
        told.append((request, msgspec.structs.replace(output, routed_experts=routes)))
    groups = score(prompts(), given, told, greedy=True, shelf=shelf)
    held = [t.routes for group in groups for t in group.trajectories]
    assert [int(shelf.get(h)[0, 0, 0]) for h in held if h is not None] == [0, 1, 3, 4, 6, 7]
    assert all(g.greedy is not None and g.greedy.routes is None for g in groups)
    assert all(t.routes is None for g in score(prompts(), given, told) for t in g.trajectories)
    shelf.keep(held[:1])
    assert held[0] is not None and held[1] is not None
    assert shelf.get(held[0]).shape == held[0].shape
    with pytest.raises(KeyError):
        shelf.get(held[1])


def test_entropies_are_asked_for_and_stay_with_their_reply() -> None:
    given = problems()
    pairs = rollout(
        actor(), prompts(), given, SAMPLING, samples=2, greedy=True, seed=7, entropy=True
    )
    # Nobody looks at those of the greedy reply.
    assert [request.entropy for request, _ in pairs] == [True, True, False] * 3
    pairs = [pair for pair in pairs if pair[0].entropy]
    told = [
        (request, msgspec.structs.replace(output, entropies=np.float32(output.logprobs) ** 2))
        for request, output in pairs
    ]
    replies = [t for group in score(prompts(), given, told) for t in group.trajectories]
    for reply, (_, output) in zip(replies, told, strict=True):
        assert reply.entropies is output.entropies
    assert not any(
        request.entropy
        for request, _ in rollout(actor(), prompts(), given, SAMPLING, samples=1, seed=7)
    )
