"""Algorithms by name, and options over them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from recipes.algorithms.presets import AlgorithmName, AlgorithmOptions, preset, resolve


@pytest.mark.parametrize("name", get_args(AlgorithmName))
def test_every_name_has_a_preset(name: AlgorithmName) -> None:
    assert resolve(AlgorithmOptions(algorithm=name), 10) == preset(name, 10)


def test_given_options_win_over_the_preset() -> None:
    got = resolve(AlgorithmOptions(algorithm="dapo", clip_high=0.5, dynamic_sampling=False), 10)
    expected = dataclasses.replace(preset("dapo", 10), clip_high=0.5, dynamic_sampling=False)
    assert got == expected


def test_dapo_sets_clip_higher_and_a_buffer() -> None:
    dapo = preset("dapo", 20)
    assert dapo.clip_high > dapo.clip_low
    assert dapo.dynamic_sampling and dapo.overlong_buffer == 4


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="a2c"):
        preset("a2c", 8)  # type: ignore[arg-type]


def test_a_kl_that_is_moved_takes_an_estimator_that_is_right_there() -> None:
    def estimator(**options: Any) -> str:
        return resolve(AlgorithmOptions(**options), 8).kl_estimator

    assert estimator(algorithm="grpo") == "k3"
    assert estimator(algorithm="grpo", kl_in="reward") == "k1"
    assert estimator(algorithm="grpo", kl_in="reward", kl_estimator="k3") == "k3"
    assert estimator(algorithm="reinforce++") == "k1"
    assert estimator(algorithm="reinforce++", kl_in="loss") == "k3"
    assert estimator(algorithm="reinforce++-baseline") == "k2"


def test_the_table_of_the_docs_has_a_row_for_every_algorithm() -> None:
    table = (Path(__file__).parents[3] / "docs" / "trainers.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z_+-]+)`.*arXiv \d{4}\.\d{5} \|$", table, re.MULTILINE)
    assert sorted(rows) == sorted(get_args(AlgorithmName))
