"""The tree against the sequences it packs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from recipes.trainers.prefix_tree import PromptResponse, build_tree, pack
from tests.helpers.trajectories import random_batch


def sequence(prompt: list[int], response: list[int]) -> PromptResponse:
    return PromptResponse(
        prompt_ids=np.array(prompt, np.int32), response_ids=np.array(response, np.int32)
    )


def random_sequences(seed: int) -> list[PromptResponse]:
    batch = random_batch(4, 5, vocab=4, seed=seed)
    return [
        PromptResponse(prompt_ids=t.prompt_ids, response_ids=t.response_ids)
        for t in batch.trajectories
    ]


def path_to(parents: np.ndarray, token_ids: np.ndarray, node: int) -> list[int]:
    tokens: list[int] = []
    while node != -1:
        tokens.append(int(token_ids[node]))
        node = int(parents[node])
    return tokens[::-1]


def test_a_small_tree_by_hand() -> None:
    tree = build_tree([sequence([5, 6], [7, 8]), sequence([5, 6], [7, 9]), sequence([5], [1])])
    assert tree.token_ids.tolist() == [5, 6, 7]
    assert tree.depths.tolist() == [0, 1, 2]
    assert tree.parents.tolist() == [-1, 0, 1]
    assert tree.predicting.tolist() == [0, 1, 2]
    assert tree.rows.tolist() == [1, 2, 1, 2, 0]
    assert tree.targets.tolist() == [7, 8, 7, 9, 1]
    assert tree.sequence.tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_every_response_token_is_predicted_from_its_own_prefix(seed: int) -> None:
    sequences = random_sequences(seed)
    tree = build_tree(sequences)
    k = 0
    for index, one in enumerate(sequences):
        for position, token in enumerate(one.response_ids.tolist()):
            node = int(tree.predicting[tree.rows[k]])
            prefix = one.prompt_ids.tolist() + one.response_ids[:position].tolist()
            assert path_to(tree.parents, tree.token_ids, node) == prefix
            assert (tree.targets[k], tree.sequence[k]) == (token, index)
            k += 1
    assert k == len(tree.targets)


@pytest.mark.parametrize("seed", range(3))
def test_prefixes_are_distinct_and_the_mask_is_the_path(seed: int) -> None:
    tree = build_tree(random_sequences(seed))
    mask = tree.ancestor_mask()
    paths = [path_to(tree.parents, tree.token_ids, n) for n in range(len(tree.parents))]
    assert len({tuple(path) for path in paths}) == len(paths)
    for node, path in enumerate(paths):
        assert tree.token_ids[np.flatnonzero(mask[node])].tolist() == path
        assert tree.depths[node] == len(path) - 1


@pytest.mark.parametrize("budget", [1, 9, 20, 1000])
def test_packing_keeps_order_and_budget(budget: int) -> None:
    sequences = random_sequences(0)
    batches = pack(sequences, budget)
    assert [i for batch in batches for i in batch] == list(range(len(sequences)))
    for batch in batches:
        nodes = len(build_tree([sequences[i] for i in batch]).token_ids)
        assert nodes <= budget or len(batch) == 1


def test_packing_keeps_groups_together_where_they_fit() -> None:
    sequences = random_sequences(1)
    sizes = [len(build_tree(sequences[i : i + 5]).token_ids) for i in range(0, 20, 5)]
    for batch in pack(sequences, max(sizes)):
        assert len(batch) % 5 == 0


def test_nothing_packs_to_nothing() -> None:
    assert pack([], 10) == []


def routed(prompt: list[int], response: list[int], experts: list[int] | None) -> PromptResponse:
    """experts: one a token but the last; a layer, an expert a token."""
    plain = sequence(prompt, response)
    routes = None if experts is None else np.array(experts, np.uint8).reshape(-1, 1, 1)
    return dataclasses.replace(plain, routes=routes)


def test_paths_part_where_routes_do() -> None:
    sequences = [
        routed([5, 6], [7, 8, 1], [0, 1, 2, 3]),
        routed([5, 6], [7, 8, 2], [0, 1, 2, 3]),
        routed([5, 6], [7, 8, 3], [0, 1, 9, 3]),
        routed([5, 6], [7, 8, 3], None),
    ]
    tree = build_tree(sequences)
    assert tree.token_ids.tolist() == [5, 6, 7, 8, 7, 8, 5, 6, 7, 8]
    assert tree.parents.tolist() == [-1, 0, 1, 2, 1, 4, -1, 6, 7, 8]
    assert tree.routes is not None and tree.routes.dtype == np.uint8
    assert tree.routes.flatten().tolist() == [0, 1, 2, 3, 9, 3, 255, 255, 255, 255]
    assert pack(sequences, 4) == [[0, 1], [2], [3]]
    assert pack(sequences, 6) == [[0, 1, 2], [3]]
    assert build_tree(sequences[3:]).routes is None
