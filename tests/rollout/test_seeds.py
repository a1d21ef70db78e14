from hypothesis import given
from hypothesis import strategies as st

from rollout.seeds import derive_seed


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
