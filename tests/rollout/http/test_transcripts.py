"""Request sequences of external trainers: statuses, replies, and the commands they become.

Each file of `transcripts/` holds what one trainer sends, in order, and which of its sources it
was read from. A step says what its client reads of the reply: `reads` are paths that have to be
there ("choices[].token_ids[]": of every choice, and at least one), `reply` values that have to be
these. `commands` is every command that reaches the engine.
"""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.protocol import ReceiveBroadcast, ReceiveIpc, Reply
from tests.helpers.http_app import Server, run, serving

FOLDER = Path(__file__).with_name("transcripts")
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


def test_every_trainer_has_one() -> None:
    assert NAMES == [
        "areal",
        "miles",
        "prime_rl",
        "skyrl",
        "slime_colocated",
        "slime_external",
        "slime_separate",
        "trl_async",
        "trl_sync",
        "verl",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_it_says_whose_it_is(name: str) -> None:
    transcript = json.loads((FOLDER / f"{name}.json").read_text())
    assert transcript["client"]
    assert any(step.get("reads") for step in transcript["steps"])


@pytest.mark.parametrize("name", NAMES)
def test_a_transcript(name: str) -> None:
    steps = json.loads((FOLDER / f"{name}.json").read_text())["steps"]

    async def test() -> None:
        async with serving() as server:
            for kind in (ReceiveBroadcast, ReceiveIpc):
                server.link.answers[kind] = lambda _: Reply()
            for number, step in enumerate(steps):
                await play(server, step, f"{name}, step {number}: {step['request']['path']}")

    run(test)


async def play(server: Server, step: dict[str, Any], where: str) -> None:
    asked = step["request"]
    reply = await server.http.request(
        asked["method"],
        asked["path"],
        json=asked.get("body"),
        params=asked.get("query"),
        headers=asked.get("headers"),
    )
    assert reply.status_code == step["status"], f"{where}: {reply.text}"
    if "reply" in step:
        assert_within(step["reply"], reply.json(), where)
    for path in step.get("reads", []):
        assert_there(path, reply.json(), where)
    found = [msgspec.json.decode(msgspec.json.encode(command)) for command in server.commands()]
    assert_within(step["commands"], found, where)


def assert_within(expected: Any, found: Any, where: str) -> None:
    """Every key of `expected` is in `found`, at any depth; lists have equal lengths."""
    if isinstance(expected, dict):
        assert isinstance(found, dict), f"{where}: {found!r}"
        for key, value in expected.items():
            assert key in found, f"{where}: {key} is missing in {found!r}"
            assert_within(value, found[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert isinstance(found, list), f"{where}: {found!r}"
        assert len(found) == len(expected), f"{where}: {found!r}"
        for index, (value, other) in enumerate(zip(expected, found, strict=True)):
            assert_within(value, other, f"{where}[{index}]")
    else:
        assert found == expected, where


def assert_there(path: str, reply: Any, where: str) -> None:
    """A path of names, "[]" for every entry of a list, which has one, "[3]" for one of them."""
    found = [reply]
    for name in re.findall(r"[^.\[\]]+|\[\d*\]", path):
        if name == "[]":
            assert all(isinstance(value, list) and value for value in found), f"{where}: {path}"
            found = [entry for value in found for entry in value]
        elif name.startswith("["):
            assert all(isinstance(value, list) for value in found), f"{where}: {path}"
            found = [value[int(name[1:-1])] for value in found]
        else:
            assert all(isinstance(value, dict) and name in value for value in found), (
                f"{where}: {path} is missing in {reply!r}"
            )
            found = [value[name] for value in found]


@pytest.mark.parametrize("path", ["a", "b.c", "b[]", "l[].x", "l[0].y", "e[]", "l[].y[]"])
def test_a_path_that_is_not_there_is_told(path: str) -> None:
    reply = {"b": {}, "l": [{"y": 1}, {"x": 2, "y": 1}], "e": []}
    assert_there("l[].y", reply, "")
    if path != "l[0].y":
        with pytest.raises(AssertionError):
            assert_there(path, reply, "")
