"""The tree of a rollout's calls: what goes on from what; every sampled token counts once."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.protocol import CallSample, FinishReason, PromptQuery, RolloutState, VersionSpan
from rollout.http.capture.transcript import transcript
from rollout.http.updates.version_labels import VersionLabels
from rollout.sessions.call_tree import CallTree


def sample(
    prompt: list[int], output: list[int], *, finish: str = "stop", text: str = "", key: bytes = b""
) -> CallSample:
    return CallSample(
        prompt_ids=np.array(prompt, np.int32),
        token_ids=np.array(output, np.int32),
        logprobs=-np.arange(len(output), dtype=np.float32),
        spans=[VersionSpan(3, 0, len(output))],
        finish=FinishReason(type=finish, matched=9 if finish == "stop" else None),
        text_bytes=len(text.encode()),
        text_digest=hashlib.sha256(text.encode()).digest() if text else b"",
        key=key,
    )


def branches(tree: CallTree) -> list[list[dict]]:
    state = RolloutState(rollout="r", timeout_s=1.0, nodes=tree.nodes)
    return [b["segments"] for b in transcript(state, VersionLabels())["branches"]]


def test_a_call_goes_on_from_a_branch_only_if_it_begins_with_all_of_it() -> None:
    tree = CallTree()
    tree.add(sample([1, 2], [3, 4]), 0)
    tree.add(sample([1, 2, 3, 4, 5], [6]), 1)
    tree.add(sample([1, 2, 3, 7], [8]), 2)
    tree.add(sample([1, 2], [9]), 3)
    assert [node.parent for node in tree.nodes] == [-1, 0, -1, -1]
    assert [node.prompt_ids.tolist() for node in tree.nodes] == [[1, 2], [5], [1, 2, 3, 7], [1, 2]]
    assert tree.ids(1).tolist() == [1, 2, 3, 4, 5, 6]
    assert len(branches(tree)) == 3


def test_nothing_goes_on_from_a_reply_that_was_not_whole() -> None:
    tree = CallTree()
    tree.add(sample([1], [2, 3], finish="abort", text="ab"), 0)
    tree.add(sample([1, 2, 3, 4], [5]), 1)
    assert tree.nodes[1].parent == -1
    assert not len(tree.prefix(PromptQuery(text="abc")).ids)


def test_a_reply_that_two_branches_share_is_new_in_one() -> None:
    tree = CallTree()
    tree.add(sample([1], [2]), 0)
    tree.add(sample([1, 2, 3], [4]), 1)
    tree.add(sample([1, 2, 5], [6]), 2)
    sampled = [[s["new"] for s in found if s["sampled"]] for found in branches(tree)]
    assert sampled == [[True, True], [False, True]]


def test_a_prompt_is_found_by_its_text_and_by_its_key() -> None:
    tree = CallTree()
    tree.add(sample([1], [2], text="ab", key=b"k1"), 0)
    tree.add(sample([1, 2, 3], [4], text="abcd", key=b"k2"), 1)
    tree.add(sample([1, 2, 3], [4], text="abcd", key=b"k2"), 2)
    found = tree.prefix(PromptQuery(text="abcde"))
    assert (found.ids.tolist(), found.text_bytes) == ([1, 2, 3, 4], 4)
    assert tree.prefix(PromptQuery(text="abx")).ids.tolist() == [1, 2]
    assert not len(tree.prefix(PromptQuery(text="a")).ids)
    found = tree.prefix(PromptQuery(text="abx", keys=[b"k1", b"k2", b"none"]))
    assert (found.ids.tolist(), found.text_bytes, found.key) == ([1, 2, 3, 4], -1, 1)
    assert found.stopped == 9
    assert tree.prefix(PromptQuery(text="abcd", keys=[b"k1"])).text_bytes == 4


IDS = st.lists(st.integers(0, 1), max_size=3)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(-1, 20), IDS, IDS), min_size=1, max_size=14))
def test_any_calls_keep_their_tokens_and_count_them_once(calls: list[tuple]) -> None:
    """Each call goes on from an earlier one, or from nothing, by any ids, few enough to collide."""
    tree = CallTree()
    wholes: list[list[int]] = []
    prompts: list[list[int]] = []
    for number, (base, more, output) in enumerate(calls):
        prompt = [*(wholes[base % len(wholes)] if base >= 0 and wholes else []), *more] or [0]
        tree.add(sample(prompt, output), number)
        prompts.append(prompt)
        wholes.append([*prompt, *output])
    for index, whole in enumerate(wholes):
        assert tree.ids(index).tolist() == whole
        node = tree.nodes[index]
        parent = tree.ids(node.parent).tolist()
        assert prompts[index][: len(parent)] == parent
        # No other branch is longer.
        longest = max((len(w) for w in wholes[:index] if prompts[index][: len(w)] == w), default=0)
        assert len(parent) == longest
    found = branches(tree)
    counted = [s["call"] for segments in found for s in segments if s["sampled"] and s["new"]]
    assert sorted(counted) == list(range(len(calls)))
    leaves = {tuple(t for s in segments for t in s["token_ids"]) for segments in found}
    assert leaves <= {tuple(whole) for whole in wholes}
