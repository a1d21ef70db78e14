"""Seeds: fixed values, different children, and what a server without one draws."""

from hypothesis import given
from hypothesis import strategies as st
from pytest import LogCaptureFixture

from rollout.requests.seeds import base_seed, common_base, derive_seed


def test_values_are_fixed_for_ever() -> None:
    assert derive_seed(0) == 0xE220A8397B1DCDAF >> 1
    assert derive_seed(7, "prompt", 3) == 780199253814030882


def test_children_differ_by_part_order_and_base() -> None:
    children = {derive_seed(base, i) for base in range(20) for i in range(500)}
    assert len(children) == 10_000
    assert derive_seed(1, 2, 3) != derive_seed(1, 3, 2)
    assert derive_seed(1, "2") != derive_seed(1, 2)
    assert derive_seed(1, "a", "b") != derive_seed(1, "ab")


@given(st.integers(), st.lists(st.integers() | st.text(max_size=5), max_size=4))
def test_seed_is_a_non_negative_63_bit_number(base: int, parts: list[int | str]) -> None:
    assert 0 <= derive_seed(base, *parts) < 2**63


def test_bits_are_balanced() -> None:
    seeds = [derive_seed(5, i) for i in range(4000)]
    for bit in range(63):
        ones = sum(seed >> bit & 1 for seed in seeds)
        assert 1800 < ones < 2200, f"bit {bit} is set {ones} of 4000 times"


def test_without_a_seed_every_start_draws_its_own_and_logs_it(caplog: LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    drawn = [base_seed(None) for _ in range(20)]
    assert len(set(drawn)) == 20 and all(0 <= seed < 2**63 for seed in drawn)
    assert all(
        str(seed) in record.getMessage() for seed, record in zip(drawn, caplog.records, strict=True)
    )


def test_a_seed_is_used_as_it_is_unless_replicas_are_set_apart() -> None:
    assert base_seed(7) == 7
    assert base_seed(7, "a") == base_seed(7, "a")
    assert len({base_seed(7), base_seed(7, "a"), base_seed(7, "b"), base_seed(8, "a")}) == 4


@given(st.integers(0, 2**63 - 1))
def test_every_seed_has_a_base_that_fits_into_a_signed_word(seed: int) -> None:
    base = common_base([seed])
    assert base is not None and -(2**63) <= base < 2**63
    assert derive_seed(base, 0) == seed


@given(st.integers(0, 2**64 - 1), st.integers(2, 9))
def test_children_of_one_base_have_it_in_common(base: int, count: int) -> None:
    seeds = [derive_seed(base, place) for place in range(count)]
    found = common_base(seeds)
    assert found is not None
    assert [derive_seed(found, place) for place in range(count)] == seeds
    assert common_base(seeds[::-1]) is None


def test_children_of_a_child_have_a_base_too() -> None:
    found = common_base([derive_seed(3, "rollout", 5, place) for place in range(4)])
    assert found is not None and derive_seed(found, 3) == derive_seed(3, "rollout", 5, 3)
