"""Numbers that no run can work with are refused, each by its option's name."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import InvalidRequest
from recipes.settings.checks import ABOVE_ZERO, BELOW_ONE, LEAST, check_options
from recipes.settings.command_line import with_values
from recipes.settings.options import RunOptions, flatten

BAD: list[tuple[str, Any, str]] = [
    *((name, least - 1, f"at least {least}") for name, least in LEAST.items()),
    *((name, 0.0, "above 0") for name in sorted(ABOVE_ZERO)),
    *((name, 1.0, r"in \[0, 1\)") for name in sorted(BELOW_ONE)),
    ("lr", float("inf"), "above 0"),
    ("beta1", float("nan"), r"in \[0, 1\)"),
    ("kl_coef", float("nan"), "at least 0"),
]


@pytest.mark.parametrize("name,value,what", BAD)
def test_a_number_out_of_its_range_is_refused_by_name(name: str, value: Any, what: str) -> None:
    kind = type(flatten(RunOptions())[name])
    given = int(value) if kind is int else value
    with pytest.raises(InvalidRequest, match=f"^{name} must be {what}, not ") as caught:
        check_options(with_values(RunOptions(model=__file__), {name: given}))
    assert caught.value.field == name


def test_the_defaults_are_in_their_ranges() -> None:
    check_options(RunOptions(model=__file__))
