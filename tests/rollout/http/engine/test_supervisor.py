"""What `--restart` does, over engines of this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

import rollout.http.engine.supervisor as supervisor_module
from engine.config import EngineConfig
from engine.errors import EngineDead
from engine.protocol import BeginUpdate, CommitUpdate, ErrorInfo, Reply, SetVersion
from rollout.http.config import Restart, ServeConfig
from rollout.http.engine.link import EngineLink
from rollout.http.engine.supervisor import Supervisor
from tests.helpers.http_app import InlineLink, Server, run, serving, until
from tests.helpers.replicas import fake_config


class Bench:
    """A server, its supervisor, and the configurations of the engines that were spawned.

    prepare: called with the link of each.
    """

    def __init__(self, server: Server, restart: Restart) -> None:
        self.server = server
        self.spawned: list[EngineConfig] = []
        self.given_up: list[EngineDead] = []
        self.prepare: Callable[[InlineLink], None] = lambda link: None
        config = ServeConfig(engine=fake_config(), restart=restart, start_s=60.0)
        self.supervisor = Supervisor(
            server.engine, config, self.spawn, self.given_up.append, lambda version: f"v{version}"
        )

    def spawn(self, config: EngineConfig) -> EngineLink:
        self.spawned.append(config)
        link = self.server.another_engine(config)
        self.prepare(link)
        return link

    async def dies_and_returns(self) -> None:
        self.server.link.die()
        await until(lambda: self.server.engine.dead is None)


@asynccontextmanager
async def bench(restart: Restart) -> AsyncIterator[Bench]:
    async with serving() as server:
        found = Bench(server, restart)
        yield found
        await found.supervisor.close()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "_PAUSE_S", 0.0)


def test_never_gives_up_at_the_first_death() -> None:
    async def test() -> None:
        async with bench("never") as found:
            found.server.link.die()
            assert [error.message for error in found.given_up] == [
                "fake engine was killed by signal 9"
            ]
            assert found.spawned == []

    run(test)


def test_an_engine_without_updates_is_started_as_it_was() -> None:
    async def test() -> None:
        async with bench("on-failure") as found:
            await found.server.engine.send(SetVersion(version=5))
            await found.dies_and_returns()
            (config,) = found.spawned
            assert (config.weight_version, config.refusal) == (5, "")
            assert found.server.engine.no_version == ""

    run(test)


def test_a_stop_string_waits_for_the_minimum_after_a_restart_too() -> None:
    async def test() -> None:
        async with bench("on-failure") as found:
            body = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 20}}
            text = (await found.server.post("/generate", body)).json()["text"]
            limits = {"max_new_tokens": 20, "min_new_tokens": 12, "stop": list(text)}
            await found.dies_and_returns()
            reply = await found.server.post("/generate", {**body, "sampling_params": limits})
            assert (reply.json()["text"], len(reply.json()["output_ids"])) == (text[:12], 13)

    run(test)


def test_an_engine_with_updates_refuses_and_counts_on() -> None:
    async def test() -> None:
        async with bench("on-failure") as found:
            engine = found.server.engine
            await engine.send(BeginUpdate(version=4))
            await engine.send(CommitUpdate(version=4))
            await found.dies_and_returns()
            (config,) = found.spawned
            assert config.weight_version == 4
            assert "version v4" in config.refusal
            assert "signal 9" in config.refusal
            assert engine.no_version == config.refusal
            # Again before anything was published: it still waits.
            await found.dies_and_returns()
            assert "version v4" in found.spawned[1].refusal

    run(test)


def test_the_third_failure_in_a_short_time_is_the_last() -> None:
    async def test() -> None:
        async with bench("on-failure") as found:
            await found.dies_and_returns()
            await found.dies_and_returns()
            found.server.link.die()
            await until(lambda: bool(found.given_up))
            assert len(found.spawned) == 2
            assert "3 times" in found.given_up[0].message

    run(test)


def test_failures_long_ago_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.http.engine.failure_window.WINDOW_S", 0.0)

    async def test() -> None:
        async with bench("on-failure") as found:
            for _ in range(5):
                await found.dies_and_returns()
            assert found.given_up == []

    run(test)


def test_an_engine_that_cannot_be_built_counts_as_a_failure() -> None:
    def unbuildable(link: InlineLink) -> None:
        link.silent = True
        error = ErrorInfo(kind="OutOfMemory", message="no room")
        asyncio.get_running_loop().call_soon(link.deliver, [Reply(error=error)])

    async def test() -> None:
        async with bench("on-failure") as found:
            found.prepare = unbuildable
            found.server.link.die()
            await until(lambda: bool(found.given_up))
            assert found.given_up[0].message.startswith("no room")
            assert len(found.spawned) == 2

    run(test)


def test_a_server_that_leaves_starts_nothing_more() -> None:
    def silent(link: InlineLink) -> None:
        link.silent = True

    async def test() -> None:
        async with bench("on-failure") as found:
            found.prepare = silent
            found.server.link.die()
            await until(lambda: len(found.spawned) == 1)
            await found.server.engine.leave(0.0)
            await found.supervisor.close()
            assert (len(found.spawned), found.given_up) == (1, [])

    run(test)
