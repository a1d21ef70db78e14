"""Numbers that no run can work with are refused, each by its option's name."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import InvalidRequest
from recipes.settings.checks import (
    ABOVE_ZERO,
    BELOW_ONE,
    LEAST,
    UP_TO_ONE,
    check_options,
    check_sft,
)
from recipes.settings.command_line import with_values
from recipes.settings.options import RunOptions, flatten
from recipes.settings.sft_options import SftOptions

BAD: list[tuple[str, Any, str]] = [
    *((name, least - 1, f"at least {least}") for name, least in LEAST.items()),
    *((name, 0.0, "above 0") for name in sorted(ABOVE_ZERO)),
    *((name, 1.0, r"in \[0, 1\)") for name in sorted(BELOW_ONE)),
    *((name, value, r"in \(0, 1\]") for name in sorted(UP_TO_ONE) for value in (0.0, 1.5)),
    ("lr", float("inf"), "above 0"),
    ("beta1", float("nan"), r"in \[0, 1\)"),
    ("kl_coef", float("nan"), "at least 0"),
]


@pytest.mark.parametrize("name,value,what", BAD)
def test_a_number_out_of_its_range_is_refused_by_name(name: str, value: Any, what: str) -> None:
    is_rl = name in flatten(RunOptions())
    kind = type(flatten(RunOptions() if is_rl else SftOptions())[name])
    given = int(value) if kind is int else value
    with pytest.raises(InvalidRequest, match=f"^{name} must be {what}, not ") as caught:
        if is_rl:
            check_options(with_values(RunOptions(model=__file__), {name: given}))
        else:
            check_sft(with_values(SftOptions(model=__file__), {name: given}))
    assert caught.value.field == name


def test_the_defaults_are_in_their_ranges() -> None:
    check_options(RunOptions(model=__file__))


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"algorithm": "grpo", "samples": 1}, "samples"),
    ({"algorithm": "reinforce++-baseline", "samples": 1}, "samples"),
    ({"algorithm": "reinforce++", "dynamic_sampling": True}, "dynamic_sampling"),
    ({"kl_controller": "adaptive"}, "kl_controller"),
    ({"num_minibatches": 9}, "num_minibatches"),
]


@pytest.mark.parametrize("values,field", IMPOSSIBLE)
def test_what_an_algorithm_cannot_do_is_refused_by_name(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}") as caught:
        check_options(with_values(RunOptions(model=__file__), values))
    assert caught.value.field == field


@pytest.mark.parametrize(
    "values",
    [
        {"algorithm": "reinforce++", "samples": 1},
        {"algorithm": "remax", "samples": 1, "dynamic_sampling": True},
        {"kl_controller": "adaptive", "kl_coef": 0.1},
    ],
)
def test_what_an_algorithm_can_do_is_let_through(values: dict[str, Any]) -> None:
    check_options(with_values(RunOptions(model=__file__), values))
