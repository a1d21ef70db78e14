"""Rotary frequencies of every served type against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.errors import CheckpointError, UnknownArchitecture
from engine.layers.rope_config import RopeConfig, read_rope, served_positions
from engine.layers.rotary import Rotary, inverse_frequencies

SETTINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 3.5},
    {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": 1.3,
    },
    {"rope_type": "yarn", "factor": 2.0},
    {"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 4096},
    {"rope_type": "yarn", "factor": 4, "truncate": None, "beta_fast": None, "mscale": 0.7},
    {"rope_type": "dynamic", "factor": 4.0},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("head_dim", [64, 100])
def test_frequencies_equal_transformers(settings: dict[str, Any], head_dim: int) -> None:
    rope = {"rope_theta": 500000.0, **settings}
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=16384,
        rope_parameters=dict(rope),
    )
    expected, expected_scale = ROPE_INIT_FUNCTIONS[settings["rope_type"]](config, "cpu")
    parsed = read_rope({"rope_parameters": rope, "max_position_embeddings": 16384})
    frequencies, scale = inverse_frequencies(parsed, head_dim)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert scale == pytest.approx(expected_scale)


def test_the_older_form_reads_the_same() -> None:
    newer = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}}
    older = {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert read_rope(newer) == read_rope(older)
    assert read_rope({"rope_theta": 5000.0, "rope_scaling": None}) == RopeConfig(theta=5000.0)


def test_yarn_without_a_factor_takes_the_ratio_of_the_contexts() -> None:
    settings = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 4096}
    rope = read_rope({"rope_parameters": settings, "max_position_embeddings": 16384})
    assert rope.factor == 4.0


@pytest.mark.parametrize("rope_type", ["longrope", "nonsense", 7, "default "])
def test_an_unknown_type_is_refused_by_name(rope_type: str) -> None:
    with pytest.raises(UnknownArchitecture, match=f"{rope_type}.*known: default") as caught:
        read_rope({"rope_scaling": {"rope_type": rope_type, "factor": 2.0}})
    assert caught.value.field == "rope_type"


CARD = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("rope", "max_position", "served"),
    [
        ({"rope_scaling": CARD}, 32768, 131072),
        ({"rope_scaling": {**CARD, "rope_type": "yarn"}}, 40960, 131072),
        ({"rope_parameters": {**CARD, "rope_theta": 1e6}}, 131072, 131072),
        ({"rope_scaling": CARD, "rope_parameters": {**CARD, "rope_theta": 1e6}}, 32768, 131072),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, 4096, 8192),
        ({"rope_scaling": {**CARD, "factor": None}}, 65536, 65536),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 4096, 4096),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 4096, 4096),
        ({}, 4096, 4096),
    ],
)
def test_the_context_that_is_served(rope: dict[str, Any], max_position: int, served: int) -> None:
    found = read_rope({**rope, "max_position_embeddings": max_position})
    assert served_positions(found, max_position) == served


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"factor": 4.0}, "rope_type"),
        ({"original_max_position_embeddings": 4096, "factor": 4.0}, "rope_type"),
        ({**CARD, "type": None}, "rope_type"),
        ({**CARD, "rope_type": "linear"}, "rope_type"),
        *(({**CARD, "factor": bad}, "factor") for bad in (0, -1, 1e400, "4", True, [4], 10**400)),
        *(({"type": "linear", "factor": bad}, "factor") for bad in (0, -2.0, float("nan"), None)),
        ({"type": "dynamic"}, "factor"),
        ({"type": "dynamic", "factor": -1.0}, "factor"),
        ({"type": "yarn"}, "factor"),
        ({**CARD, "factor": 1e300}, "factor"),
        ({**CARD, "original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ({**CARD, "original_max_position_embeddings": 1.5}, "original_max_position_embeddings"),
        ({**CARD, "rope_theta": 1.0}, "rope_theta"),
        ({**CARD, "rope_theta": 0}, "rope_theta"),
        ({**CARD, "attention_factor": 0}, "attention_factor"),
        ({**CARD, "attention_factor": "1"}, "attention_factor"),
        ({**CARD, "beta_fast": -1}, "beta_fast"),
        ({**CARD, "truncate": "no"}, "truncate"),
        ({"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
         "high_freq_factor"),
        ({"frequency_divisors": [1.0, 0.0]}, "frequency_divisors"),
        ({"frequency_divisors": 2.0}, "frequency_divisors"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_computed_with_is_named(
    settings: dict[str, Any], field: str
) -> None:
    for spelling in ("rope_scaling", "rope_parameters"):
        with pytest.raises((CheckpointError, UnknownArchitecture), match=field) as caught:
            rope = read_rope({spelling: settings, "max_position_embeddings": 4096})
            served_positions(rope, 4096)
        assert caught.value.field == field


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({**CARD, "llama_4_scaling_beta": 0.1}, "llama_4_scaling_beta"),
        ({"type": "dynamic", "factor": 2.0, "alpha": 1000.0}, "alpha"),
        ({"rope_type": "default", "mrope_section": [16, 24, 24]}, "mrope_section"),
        ({"rope_type": "default", "factor": 4.0}, "factor"),
        ({"type": "linear", "factor": 4.0, "attention_factor": 1.2}, "attention_factor"),
    ],
)
def test_a_setting_that_its_type_does_not_use_is_refused(
    settings: dict[str, Any], field: str
) -> None:
    with pytest.raises(UnknownArchitecture, match=field) as caught:
        read_rope({"rope_parameters": settings, "max_position_embeddings": 4096})
    assert caught.value.field == field


def test_two_spellings_may_not_differ() -> None:
    newer = {"rope_type": "default", "rope_theta": 1e6}
    with pytest.raises(CheckpointError, match="put all settings into rope_parameters"):
        read_rope({"rope_scaling": CARD, "rope_parameters": newer})
    with pytest.raises(CheckpointError, match="rope_scaling"):
        read_rope({"rope_scaling": "yarn"})


def test_a_setting_its_type_needs_is_named() -> None:
    with pytest.raises(CheckpointError, match="low_freq_factor"):
        read_rope({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}})


def test_a_partial_rotary_factor_is_refused() -> None:
    with pytest.raises(UnknownArchitecture, match="partial_rotary_factor"):
        read_rope({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}})


def test_divisors_divide_the_frequencies() -> None:
    plain, _ = inverse_frequencies(RopeConfig(), 4)
    divided, _ = inverse_frequencies(RopeConfig(frequency_divisors=(1.0, 8.0)), 4)
    torch.testing.assert_close(divided, plain / torch.tensor([1.0, 8.0]))


def test_the_table_holds_cosines_then_sines_times_the_scale() -> None:
    rope = RopeConfig(rope_type="yarn", factor=4.0, original_max_position=64, attention_factor=1.5)
    rotary = Rotary(rope, 8, 100, device=torch.device("cpu"), backend="torch")
    frequencies, _ = inverse_frequencies(rope, 8)
    angles = 99 * frequencies
    assert rotary.cos_sin_MD.shape == (100, 8)
    torch.testing.assert_close(rotary.cos_sin_MD[99, :4], 1.5 * angles.cos())
    torch.testing.assert_close(rotary.cos_sin_MD[99, 4:], 1.5 * angles.sin())
