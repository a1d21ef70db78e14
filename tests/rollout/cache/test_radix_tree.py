"""The prefix tree: match, insert, split, lock, evict."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.cache.radix_node import Match, common_prefix
from rollout.cache.radix_tree import RadixTree

SIZE = 4


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def run(start: int, count: int) -> np.ndarray:
    return np.arange(start, start + count, dtype=np.int32)


def match(tree: RadixTree, tokens: np.ndarray, limit: int | None = None, step: int = 9) -> Match:
    limit = len(tokens) if limit is None else limit
    return tree.match(tree.root(0, ""), tokens, limit, step)


def insert(tree: RadixTree, tokens: np.ndarray, pages: np.ndarray, step: int = 0, own=False):
    result = tree.insert(tree.root(0, ""), tokens, pages, step, own=own)
    tree.check_integrity()
    return result


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix(left, right):
    count = 0
    while count < min(len(left), len(right)) and left[count] == right[count]:
        count += 1
    assert common_prefix(np.array(left, np.int32), np.array(right, np.int32)) == count


def test_empty_tree_matches_nothing():
    found = match(RadixTree(SIZE), run(0, 9))
    assert found.num_tokens == 0 and found.source is None and found.num_pending == 0


def test_matches_whole_pages_and_copies_the_rest():
    tree = RadixTree(SIZE)
    insert(tree, run(0, 10), ids(7, 8, 9))
    found = match(tree, run(0, 10), limit=9)
    assert found.pages.tolist() == [7, 8]
    assert found.source is not None and found.source.pages.tolist() == [9]
    assert (found.num_copied, found.num_tokens) == (1, 9)


def test_limit_inside_a_full_page_is_copied_from_it():
    tree = RadixTree(SIZE)
    insert(tree, run(0, 8), ids(7, 8))
    found = match(tree, run(0, 8), limit=7)
    assert found.pages.tolist() == [7]
    assert found.source is not None and found.source.pages[0] == 8
    assert found.num_tokens == 7
    tree.check_integrity()


def test_diverging_page_is_copied_up_to_where_it_differs():
    tree = RadixTree(SIZE)
    insert(tree, ids(0, 1, 2, 3, 4, 5, 6, 7), ids(0, 1))
    found = match(tree, ids(0, 1, 2, 3, 4, 5, 90, 91))
    assert found.pages.tolist() == [0] and found.num_copied == 2


def test_page_written_by_the_same_step_is_shared_but_not_copied():
    tree = RadixTree(SIZE)
    insert(tree, run(0, 10), ids(7, 8, 9), step=5)
    now, later = match(tree, run(0, 10), 9, step=5), match(tree, run(0, 10), 9, step=6)
    assert (now.num_tokens, now.num_pending) == (8, 9)
    assert later.num_tokens == 9


def test_split_keeps_the_lock_of_the_longer_prefix():
    tree = RadixTree(SIZE)
    node, _ = insert(tree, run(0, 12), ids(0, 1, 2))
    tree.lock(node)
    insert(tree, np.concatenate((run(0, 4), run(50, 8))), ids(0, 3, 4))
    assert tree.num_evictable == 2
    assert sorted(tree.evict(9).tolist()) == [3, 4]
    assert match(tree, run(0, 12)).pages.tolist() == [0, 1, 2]
    tree.unlock(node)
    tree.check_integrity()
    assert tree.evict(9).tolist() in ([2, 1, 0], [1, 2, 0], [0, 1, 2])
    assert tree.num_pages == 0


def test_existing_pages_stay_and_only_new_ones_are_adopted():
    tree = RadixTree(SIZE)
    insert(tree, run(0, 4), ids(0))
    _, adopted = insert(tree, run(0, 12), ids(5, 6, 7))
    assert adopted.tolist() == [6, 7]
    assert match(tree, run(0, 12)).pages.tolist() == [0, 6, 7]


def test_own_insert_stops_where_the_pages_are_another_s():
    tree = RadixTree(SIZE)
    root = tree.root(0, "")
    insert(tree, run(0, 4), ids(0))
    node, adopted = insert(tree, run(0, 12), ids(5, 6, 7), own=True)
    assert node is root and len(adopted) == 0
    node, adopted = insert(tree, run(0, 12), ids(0, 6, 7), own=True)
    assert node.pages.tolist() == [6, 7] and adopted.tolist() == [6, 7]


def test_second_holder_of_a_partial_page_gets_the_parent():
    tree = RadixTree(SIZE)
    first, _ = insert(tree, run(0, 6), ids(0, 1), own=True)
    again, adopted = insert(tree, run(0, 6), ids(0, 2), own=True)
    assert again is first.parent and len(adopted) == 0


def test_fuller_page_takes_the_place_of_the_partial_leaf():
    tree = RadixTree(SIZE)
    insert(tree, run(0, 6), ids(0, 1))
    _, adopted = insert(tree, run(0, 8), ids(0, 1))
    assert len(adopted) == 0 and tree.num_pages == 2
    assert match(tree, run(0, 8)).pages.tolist() == [0, 1]


def test_evicts_least_recently_used_first():
    tree = RadixTree(SIZE)
    for index in range(3):
        insert(tree, run(10 * index, 4), ids(index))
    match(tree, run(0, 4))
    assert tree.evict(1).tolist() == [1]
    assert tree.evict(1).tolist() == [2]
    assert tree.evict(1).tolist() == [0]
    assert tree.evict(1).tolist() == []


def test_eviction_shortens_a_long_leaf_from_its_end():
    tree = RadixTree(SIZE)
    insert(tree, run(0, 12), ids(0, 1, 2))
    assert tree.evict(1).tolist() == [2]
    tree.check_integrity()
    assert match(tree, run(0, 12)).pages.tolist() == [0, 1]


def test_versions_and_salts_are_apart():
    tree = RadixTree(SIZE)
    tree.insert(tree.root(1, ""), run(0, 4), ids(0), 0, own=False)
    tree.insert(tree.root(1, "a"), run(0, 4), ids(1), 0, own=False)
    tree.insert(tree.root(2, ""), run(0, 4), ids(2), 0, own=False)
    for version, salt, page in ((1, "", 0), (1, "a", 1), (2, "", 2)):
        found = tree.match(tree.root(version, salt), run(0, 4), 4, 1)
        assert found.pages.tolist() == [page]
    assert tree.match(tree.root(2, "a"), run(0, 4), 4, 1).num_tokens == 0
    tree.check_integrity()


def test_dropped_nodes_can_still_be_unlocked():
    tree = RadixTree(SIZE)
    node, _ = insert(tree, run(0, 8), ids(0, 1))
    tree.lock(node)
    assert sorted(tree.drop().tolist()) == [0, 1]
    assert (tree.num_pages, tree.num_evictable) == (0, 0)
    tree.unlock(node)
    tree.check_integrity()
    with pytest.raises(AssertionError, match="not locked"):
        tree.unlock(node)


def test_roots_without_a_tree_do_not_pile_up():
    tree = RadixTree(SIZE)
    for index in range(1000):
        tree.insert(tree.root(0, str(index)), run(0, 4), ids(0), 0, own=False)
        tree.evict(1)
    assert len(list(tree.nodes())) <= 65


def test_heap_stays_bounded_by_the_tree():
    tree = RadixTree(SIZE)
    node, _ = insert(tree, run(0, 4), ids(0))
    for _ in range(5000):
        tree.lock(node)
        tree.unlock(node)
    assert len(tree._heap) <= 4 * tree.num_pages + 1025


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=1, max_size=10),
    st.lists(st.integers(0, 1), min_size=1, max_size=14),
    st.integers(1, 4),
)
def test_match_is_the_longest_prefix_of_anything_inserted(known, wanted, size):
    tree, content, next_page = RadixTree(size), {}, 0
    for tokens in known:
        count = -(-len(tokens) // size)
        pages = np.arange(next_page, next_page + count, dtype=np.int32)
        next_page += count
        for column, page in enumerate(pages.tolist()):
            content[page] = tokens[: (column + 1) * size]
        insert(tree, np.array(tokens, np.int32), pages)
    found = match(tree, np.array(wanted, np.int32))
    best = max(common_prefix(np.array(t, np.int32), np.array(wanted, np.int32)) for t in known)
    full = max(
        common_prefix(np.array(t[: len(t) // size * size]), np.array(wanted)) // size for t in known
    )
    assert len(found.pages) == full
    assert found.num_tokens == best
    for column, page in enumerate(found.pages.tolist()):
        assert content[page] == wanted[: (column + 1) * size]
    if found.source is not None:
        held = content[int(found.source.pages[0])]
        assert held[: found.num_tokens] == wanted[: found.num_tokens]
    held = sorted(page for node in tree.nodes() for page in node.pages.tolist())
    assert sorted(tree.evict(10**6).tolist()) == held
    assert tree.num_pages == 0
    tree.check_integrity()
