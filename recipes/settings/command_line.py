"""From arguments, a TOML file and a run to resume to the options of a recipe.

Flags override the TOML file, which overrides the defaults. A resumed run takes its own
config.json as the defaults, and refuses changes that would make it another run.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_type_hints

import msgspec
import tyro

from engine.errors import InvalidRequest
from recipes.settings.checks import check_options, check_sft
from recipes.settings.options import PpoOptions, RunOptions, flatten, groups_of
from recipes.settings.sft_options import SftOptions

Options = TypeVar("Options", RunOptions, SftOptions)

CHANGEABLE = frozenset(
    {
        "steps",
        "epochs",
        "minutes",
        "out",
        "resume",
        "wandb",
        "eval_every",
        "eval_set",
        "eval_samples",
        "eval_temperature",
        "eval_k",
        "checkpoint_every",
        "keep_rollouts",
        "keep_entropy",
        "dashboard",
        "config",
        "kv_memory_gb",
        "teacher_kv_memory_gb",
        "rollout_gpus",
        "endpoint",
        "endpoint_patience",
        "launch",
        "rollout_tp",
        "rendezvous_host",
        "sleep",
        "max_failed_share",
        "reward_gpu",
        "reward_memory_gb",
    }
)
"""Options a resumed run may be given anew: none of them changes a step that both runs take."""

NAMED_OTHERWISE = MappingProxyType({"async": "asynchronous"})
"""Flags that are words of Python, and the options that they give."""


def parse(argv: Sequence[str], defaults: RunOptions | None = None) -> RunOptions:
    """Options of a command line. Raises InvalidRequest or ModelNotFound naming the option;
    a flag that does not exist, or --help, ends the process as command lines do.

    defaults: of the recipe, whose kind of options is the one that is returned; None takes those of
    grpo.py."""
    options = _parse(argv, RunOptions() if defaults is None else defaults)
    check_options(options)
    return options


def parse_sft(argv: Sequence[str]) -> SftOptions:
    """As `parse`, those of a supervised run."""
    options = _parse(argv, SftOptions())
    check_sft(options)
    return options


def recipe_of(options: RunOptions | SftOptions) -> str:
    """The file of the recipe that takes options of this kind."""
    if isinstance(options, SftOptions):
        return "sft.py"
    return "ppo.py" if isinstance(options, PpoOptions) else "grpo.py"


def _parse(argv: Sequence[str], defaults: Options) -> Options:
    kind = type(defaults)
    resume = _peek(argv, "--resume")
    saved = None
    if resume is not None:
        saved = _load_config(Path(resume) / "config.json", defaults)
        defaults = saved
    toml = _peek(argv, "--config")
    if toml is not None:
        defaults = with_values(defaults, _read_toml(Path(toml)))
    args = joined(joined(argv, "--reward"), "--endpoint")
    options = tyro.cli(kind, default=defaults, args=args, prog=recipe_of(defaults))
    if saved is not None:
        options = with_values(options, _without_repeated_sets(flatten(options)))
        _check_unchanged(saved, options)
    return options


def joined(argv: Sequence[str], flag: str) -> list[str]:
    """The words with all the places of a flag that takes several made one: of a flag that is there
    twice the command line would take the last alone."""
    values: list[str] = []
    others: list[str] = []
    inside = False
    for word in argv:
        name, equals, value = word.partition("=")
        if name == flag:
            inside = True
            values += [value] if equals else []
        elif inside and not word.startswith("-"):
            values.append(word)
        else:
            inside = False
            others.append(word)
    return [*others, flag, *values] if values else list(argv)


def _without_repeated_sets(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Sets on the command line join those of the run to resume, which they may repeat."""
    sets = flat.get("eval_set")
    return {} if sets is None else {"eval_set": tuple(dict.fromkeys(sets))}


def _read_toml(path: Path) -> dict[str, Any]:
    """The keys of a TOML file of options. Raises InvalidRequest if it cannot be read."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        return {NAMED_OTHERWISE.get(key, key): value for key, value in found.items()}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidRequest(f"config: {path}: {error}", field="config") from error


def with_values(options: Options, values: dict[str, Any]) -> Options:
    """The options with some replaced. InvalidRequest names a key that is unknown or a value
    of the wrong type."""
    known = flatten(options)
    for key in values:
        if key not in known:
            raise InvalidRequest(
                f"{key} is not an option; see --help (names have _ for -)", field=key
            )
    replaced = {group: _replace(getattr(options, group), values) for group in groups_of(options)}
    result = _replace(dataclasses.replace(options, **replaced), values)
    assert isinstance(result, type(options))
    return result


def _replace(target: Any, values: dict[str, Any]) -> Any:
    names = {f.name for f in dataclasses.fields(target)} - set(groups_of(target))
    hints = get_type_hints(type(target))
    mine = {key: _typed(key, value, hints[key]) for key, value in values.items() if key in names}
    return dataclasses.replace(target, **mine)


def _typed(key: str, value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{key}: {error}, not {value!r}", field=key) from error


def _load_config(path: Path, defaults: Options) -> Options:
    """The options a run was started with. InvalidRequest if there is no such run of the recipe."""
    try:
        values = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise InvalidRequest(
            f"resume: cannot read {path} ({error}); give the folder of a run", field="resume"
        ) from error
    recipe, unknown = _recipe_of(values), sorted(values.keys() - flatten(defaults).keys())
    if recipe != _recipe_of(flatten(defaults)):
        raise InvalidRequest(
            f"resume: {path.parent} is a run of {recipe}; continue it with that", field="resume"
        )
    if unknown:
        raise InvalidRequest(
            f"resume: {path} has {unknown[0]}, which is no option of {recipe}; continue it with "
            "the version that wrote it",
            field="resume",
        )
    return with_values(defaults, values)


def _recipe_of(values: Mapping[str, Any]) -> str:
    """The command whose options these are, by what it alone has."""
    if "train_on" in values:
        return "recipes/sft.py"
    return "recipes/ppo.py" if values.get("algorithm") == "ppo" else "recipes/grpo.py"


def _check_unchanged(saved: Options, options: Options) -> None:
    """Refuse a resumed run an option that would make its steps others than those it took."""
    before, after = flatten(saved), flatten(options)
    changeable = set(CHANGEABLE)
    if saved.optimizer.schedule != "constant":
        changeable -= {"steps", "epochs"}
    for name, value in before.items():
        if name not in changeable and after[name] != value:
            raise InvalidRequest(
                f"{name} is {value!r} in the run to resume and {after[name]!r} here; leave it "
                "out to continue, or start a new run",
                field=name,
            )


def _peek(argv: Sequence[str], flag: str) -> str | None:
    """The value of a flag, read before the others are known."""
    for position, argument in enumerate(argv):
        if argument == flag and position + 1 < len(argv):
            return argv[position + 1]
        if argument.startswith(f"{flag}="):
            return argument.removeprefix(f"{flag}=")
    return None
