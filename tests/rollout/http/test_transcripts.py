"""Request sequences of external trainers: statuses, replies, and the commands they become.

Each file of `transcripts/` holds what one trainer sends, in order. A step lists the parts of
the reply that the trainer reads, and every command that reaches the engine.
"""

import json
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
        "prime_rl",
        "slime_colocated",
        "slime_separate",
        "trl_async",
        "trl_sync",
    ]


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
        asked["method"], asked["path"], json=asked.get("body"), params=asked.get("query")
    )
    assert reply.status_code == step["status"], f"{where}: {reply.text}"
    if "reply" in step:
        assert_within(step["reply"], reply.json(), where)
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
