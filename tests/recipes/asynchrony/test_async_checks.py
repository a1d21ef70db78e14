"""Options that asynchronous training cannot work with, each refused by its name."""

from __future__ import annotations

import pytest

from engine.errors import InvalidRequest
from recipes.settings.command_line import parse
from recipes.settings.options import PpoOptions

MODEL = ["--model", __file__]


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--max-staleness", "-1"], "max_staleness"),
        (["--max-staleness", "80"], "max_staleness"),
        (["--max-staleness", "5", "--steps", "5"], "max_staleness"),
        (["--max-staleness", "79", "--prompts-per-step", "128"], "max_staleness"),
        (["--no-bypass"], "is_level"),
        (["--no-bypass", "--algorithm", "dppo"], "bypass"),
        (["--algorithm", "dppo", "--is-level", "token"], "is_level"),
        (["--routing-replay"], "routing_replay"),
        (["--sleep", "True"], "sleep"),
        (["--endpoint", "http://127.0.0.1:1"], "endpoint"),
        (["--engine-steps", "-1"], "engine_steps"),
        (["--engine-steps", "4", "--rollout-gpus", "1"], "engine_steps"),
        (["--strict-age", "--max-staleness", "0"], "strict_age"),
    ],
)
def test_what_cannot_work_is_refused_by_name(flags: list[str], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field) as caught:
        parse([*MODEL, "--async", *flags])
    assert caught.value.field == field


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--max-staleness", "0", "--routing-replay"],
        ["--no-bypass", "--is-level", "token", "--is-mode", "zero", "--is-cap", "5"],
        ["--algorithm", "dppo", "--strict-age"],
        ["--rollout-gpus", "1", "--stale-kv", "recompute"],
    ],
)
def test_what_works_is_taken(flags: list[str]) -> None:
    assert parse([*MODEL, "--async", *flags]).asynchrony.asynchronous


@pytest.mark.parametrize(
    "flags",
    [
        ["--max-staleness", "2"],
        ["--strict-age"],
        ["--no-bypass"],
        ["--stale-kv", "recompute"],
        ["--engine-steps", "3"],
    ],
)
def test_what_would_be_ignored_without_async_is_refused(flags: list[str]) -> None:
    name = flags[0].removeprefix("--no-").removeprefix("--").replace("-", "_")
    with pytest.raises(
        InvalidRequest, match=rf"^{name}: .* says nothing here, .*--async"
    ) as caught:
        parse([*MODEL, *flags])
    assert caught.value.field == name


def test_a_critic_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="GAE") as caught:
        parse([*MODEL, "--async"], PpoOptions())
    assert caught.value.field == "async"


def test_a_file_of_options_calls_it_as_the_flag_does(tmp_path) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text("async = true\nmax_staleness = 3\n")
    given = parse([*MODEL, "--config", str(toml)]).asynchrony
    assert (given.asynchronous, given.max_staleness) == (True, 3)
