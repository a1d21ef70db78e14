"""Who gets a request, decided by numbers: prefixes, groups, sessions, loads."""

from dataclasses import dataclass

import pytest

from rollout.router.choice.ask import Ask, Choice
from rollout.router.choice.blocks import BLOCK_BYTES, blocks_of
from rollout.router.choice.cache_aware import GROUP_S, CacheAware
from rollout.router.choice.plain_policies import LeastLoad, RoundRobin, least
from rollout.router.choice.prefix_index import PrefixIndex, holder_of, number_of


@dataclass
class Load:
    url: str
    num_open: int = 0
    num_bytes: int = 0
    epoch: int = 0


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def loads(count: int) -> list[Load]:
    return [Load(f"http://w{number}") for number in range(count)]


def policy() -> tuple[CacheAware, Clock]:
    clock = Clock()
    return CacheAware(seed=0, clock=clock), clock


def prompt(name: str, blocks: int) -> bytes:
    return b"".join((f"{name}{number:05}" * 64).encode()[:BLOCK_BYTES] for number in range(blocks))


def insert(index: PrefixIndex, text: bytes, holder: int) -> None:
    blocks = blocks_of(text)
    index.insert(blocks, index.num_known(blocks), holder)


def longest(index: PrefixIndex, text: bytes) -> dict[int, int]:
    blocks = blocks_of(text)
    return index.longest(blocks, index.num_known(blocks))


def place(found: Choice) -> int:
    return found.place


def test_a_conversation_stays_where_its_beginning_is() -> None:
    chosen, clock = policy()
    workers = loads(8)
    first = place(chosen.choose(Ask(prompt("a", 8)), workers))
    clock.now += 10 * GROUP_S
    found = chosen.choose(Ask(prompt("a", 20)), workers)
    assert (found.place, found.reason, found.num_hit) == (first, "prefix", 8 * BLOCK_BYTES)
    # Until the detour is cheaper than the cache is worth.
    workers[first].num_open = 1000
    assert place(chosen.choose(Ask(prompt("a", 21)), workers)) != first


def test_different_prompts_are_spread() -> None:
    chosen, _ = policy()
    workers = loads(8)
    for number in range(64):
        at = place(chosen.choose(Ask(prompt(f"p{number}", 4)), workers))
        workers[at].num_open += 1
        workers[at].num_bytes += 4 * BLOCK_BYTES
    assert [worker.num_open for worker in workers] == [8] * 8


def test_equal_prompts_that_come_together_stay_together() -> None:
    chosen, clock = policy()
    workers = loads(4)
    first = place(chosen.choose(Ask(b"[1,2]"), workers))
    for _ in range(40):
        workers[first].num_open += 1
        clock.now += GROUP_S / 4
        found = chosen.choose(Ask(b"[1,2]"), workers)
        assert (found.place, found.reason) == (first, "group")
    # A group that is larger than the others' work is divided.
    workers[first].num_open = 500
    assert chosen.choose(Ask(b"[1,2]"), workers).place != first


def test_what_a_worker_had_before_its_weights_changed_counts_for_nothing() -> None:
    chosen, clock = policy()
    workers = loads(2)
    first = place(chosen.choose(Ask(prompt("a", 8)), workers))
    workers[first].epoch += 1
    clock.now += 10 * GROUP_S
    assert chosen.choose(Ask(prompt("a", 9)), workers).num_hit == 0


def test_a_session_has_one_worker_and_most_keep_it_when_one_leaves() -> None:
    chosen, _ = policy()
    workers = loads(10)
    keys = [f"session-{number}".encode() for number in range(400)]
    before = {key: place(chosen.choose(Ask(key=key), workers)) for key in keys}
    assert before == {key: place(chosen.choose(Ask(key=key), workers)) for key in keys}
    spread = [list(before.values()).count(at) for at in range(10)]
    assert min(spread) > 15
    left = workers[:-1]
    for key, at in before.items():
        if at != 9:
            assert place(chosen.choose(Ask(key=key), left)) == at
    workers[before[keys[0]]].num_open = 100
    assert place(chosen.choose(Ask(key=keys[0]), workers)) != before[keys[0]]


def test_least_load_counts_requests_then_bytes_and_takes_turns() -> None:
    workers = loads(3)
    assert sorted(LeastLoad().choose(Ask(), workers).place for _ in range(1)) == [1]
    chosen = LeastLoad()
    assert {place(chosen.choose(Ask(), workers)) for _ in range(3)} == {0, 1, 2}
    workers[0].num_open = workers[1].num_open = 1
    assert place(chosen.choose(Ask(), workers)) == 2
    workers[2].num_open, workers[0].num_bytes = 1, 5
    workers[1].num_bytes = 3
    assert least(workers, 0) == 2


def test_round_robin_goes_round() -> None:
    chosen = RoundRobin()
    assert [place(chosen.choose(Ask(), loads(3))) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_the_index_finds_the_longest_prefix_against_a_plain_search() -> None:
    index = PrefixIndex()
    x, y = holder_of(0, 0), holder_of(1, 0)
    known = [(prompt("a", 3), x), (prompt("a", 6), y), (prompt("b", 5), x)]
    for text, holder in known:
        insert(index, text, holder)
    for text in (prompt("a", 9), prompt("a", 5), prompt("b", 2), prompt("c", 4)):
        found = longest(index, text)
        wanted = max(
            (min(len(blocks_of(text)), len(blocks_of(other))) if other[:9] == text[:9] else 0)
            for other, _ in known
        )
        assert max(found.values(), default=0) == wanted


def test_the_index_is_bounded_and_forgets_what_nobody_asked_for() -> None:
    index = PrefixIndex(most=40)
    for number in range(100):
        insert(index, prompt(f"p{number}", 4), holder_of(0, 0))
        assert len(index) <= 40
    assert longest(index, prompt("p0", 4)) == {}
    assert longest(index, prompt("p99", 4)) == {holder_of(0, 0): 4}


def test_of_many_holders_the_latest_are_known_each_once_and_in_its_last_epoch() -> None:
    index = PrefixIndex()
    for number in range(6):
        insert(index, prompt("a", 2), holder_of(number, 0))
    assert set(longest(index, prompt("a", 2))) == {holder_of(n, 0) for n in (2, 3, 4, 5)}
    insert(index, prompt("a", 2), holder_of(4, 1))
    found = longest(index, prompt("a", 2))
    assert {number_of(holder) for holder in found} == {2, 3, 4, 5}
    assert holder_of(4, 1) in found and holder_of(4, 0) not in found


def test_blocks_that_change_places_are_another_prefix() -> None:
    first, second = b"x" * BLOCK_BYTES, b"y" * BLOCK_BYTES
    one, other = blocks_of(first + second), blocks_of(second + first)
    assert one[0] != other[0] and one[1] != other[1]
    assert len({*blocks_of(first * 5)}) == 5
    assert blocks_of(first + second + b"rest") == one


def test_workers_that_come_and_go_for_ever_leave_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rollout.router.choice.numbers._MOST_URLS", 100)
    chosen, clock = policy()
    stays = Load("http://stays")
    for turn in range(20):
        others = (Load(f"http://w{turn}-{number}") for number in range(60))
        workers = (stays, *others) if turn else (stays,)
        stays.num_open = 0 if turn % 2 == 0 else 1000
        clock.now += 10 * GROUP_S
        found = chosen.choose(Ask(prompt("a", 8)), workers)
        assert len(chosen._workers._by_url) <= 161
        if turn and turn % 2 == 0:
            assert (found.place, found.num_hit) == (0, 8 * BLOCK_BYTES)
