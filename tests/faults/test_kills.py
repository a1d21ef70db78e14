"""Kills and stops of each process under load: every open request gets a typed answer in bounded
time, no process is left, and the exit code tells a supervisor what happened."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx
import pytest

from tests.helpers.loaded_server import Load, family, slow_server, untyped
from tests.helpers.serve_process import ServerProcess, gone

pytestmark = pytest.mark.slow

SHORT_S = 3.0
EXIT_S = 60.0


@contextmanager
def loaded(
    *, timeout_s: float = 60.0, num_tokens: int = 400
) -> Iterator[tuple[ServerProcess, dict[str, int], Load]]:
    """A server of two ranks, its processes, and requests that have begun."""
    with slow_server(2, timeout_s=timeout_s) as server:
        processes = family(server.process.pid)
        assert processes.keys() == {"server", "leader", "rank"}
        try:
            with Load(server.url, num_tokens=num_tokens) as load:
                load.started()
                yield server, processes, load
        finally:
            for pid in processes.values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def assert_nothing_left(processes: dict[str, int]) -> None:
    for name, pid in processes.items():
        assert gone(pid, EXIT_S), f"the {name} was left behind"


@pytest.mark.parametrize("who", ["leader", "rank"])
def test_a_killed_part_of_the_engine_answers_everybody_and_shows_in_the_exit_code(who: str) -> None:
    with loaded() as (server, processes, load):
        os.kill(processes[who], signal.SIGKILL)
        answers = load.answers()
        assert untyped(answers) == []
        assert any(answer.error == "EngineDead" or answer.finish == "abort" for answer in answers)
        assert server.process.wait(EXIT_S) != 0
        assert_nothing_left(processes)


def test_a_leader_that_stops_for_good_is_given_up_at_its_deadline() -> None:
    with loaded(timeout_s=SHORT_S) as (server, processes, load):
        os.kill(processes["leader"], signal.SIGSTOP)
        answers = load.answers()
        assert untyped(answers) == []
        assert any(answer.error == "EngineDead" or answer.finish == "abort" for answer in answers)
        assert server.process.wait(EXIT_S) != 0
        assert any("no sign of life" in line for line in server.lines)
        assert_nothing_left(processes)


def test_an_idle_leader_that_stops_is_seen_by_health_and_then_given_up() -> None:
    with (
        slow_server(timeout_s=2 * SHORT_S, last_answers_s=2.0) as server,
        httpx.Client(base_url=server.url) as http,
    ):
        processes = family(server.process.pid)
        assert http.get("/health").status_code == 200
        os.kill(processes["leader"], signal.SIGSTOP)
        told = []
        while server.process.poll() is None:
            with suppress(httpx.TransportError):
                told.append(http.get("/health"))
            time.sleep(0.05)
        late = [reply.json()["error"] for reply in told if reply.status_code == 503]
        assert all("no sign of life" in error["message"] for error in late)
        assert {error["type"] for error in late} >= {"NotReady", "EngineDead"}
        assert server.process.wait() != 0
        assert_nothing_left(processes)


def test_a_rank_that_stops_for_good_keeps_nobody_waiting() -> None:
    """Ranks of the fake engine have no collectives, so rank 0 may well finish the steps by itself;
    the rank that stopped is ended with the others all the same."""
    with loaded(timeout_s=SHORT_S, num_tokens=100) as (server, processes, load):
        os.kill(processes["rank"], signal.SIGSTOP)
        answers = load.answers()
        assert untyped(answers) == []
        if any(answer.error for answer in answers):
            assert server.process.wait(EXIT_S) != 0
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(EXIT_S)
        assert_nothing_left(processes)


def test_a_part_that_stops_for_a_while_costs_nothing_but_time() -> None:
    with slow_server(2) as server:
        processes = family(server.process.pid)
        for pid in processes.values():
            with Load(server.url, num_tokens=60) as load:
                load.started()
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.5)
                os.kill(pid, signal.SIGCONT)
                for number, answer in enumerate(load.answers()):
                    assert answer.tokens == load.expected(number), answer
                    assert answer.finish == "length"
        assert server.terminate() == 0
        assert_nothing_left(processes)


def test_a_server_that_is_told_to_leave_answers_everybody() -> None:
    with loaded() as (server, processes, load):
        server.process.send_signal(signal.SIGTERM)
        answers = load.answers()
        assert untyped(answers) == []
        for number, answer in enumerate(answers):
            assert answer.tokens == load.expected(number)[: len(answer.tokens)]
        assert server.process.wait(EXIT_S) == 0
        assert_nothing_left(processes)


@pytest.mark.parametrize("who", ["leader", "rank"])
def test_a_part_that_is_told_to_leave_by_itself_answers_everybody(who: str) -> None:
    """As a whole process group is told by a terminal or a scheduler: it may go on until the
    server ends it, or leave as one that died; nobody is left without a word."""
    with loaded() as (server, processes, load):
        os.kill(processes[who], signal.SIGTERM)
        assert untyped(load.answers()) == []
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(EXIT_S)
        assert_nothing_left(processes)


def test_a_killed_server_takes_its_engine_along() -> None:
    with loaded() as (server, processes, load):
        server.process.kill()
        answers = load.answers()
        assert all(answer.broken or answer.finish for answer in answers)
        server.process.wait(EXIT_S)
        assert_nothing_left(processes)


def test_the_whole_group_told_to_leave_at_once() -> None:
    with loaded() as (server, processes, load):
        for pid in processes.values():
            os.kill(pid, signal.SIGTERM)
        assert untyped(load.answers()) == []
        server.process.wait(EXIT_S)
        assert_nothing_left(processes)


def test_a_leader_that_is_killed_takes_a_rank_along_that_is_stopped() -> None:
    """A rank that is stopped cannot see that its leader is gone."""
    with loaded() as (server, processes, load):
        os.kill(processes["rank"], signal.SIGSTOP)
        os.kill(processes["leader"], signal.SIGKILL)
        assert untyped(load.answers()) == []
        assert server.process.wait(EXIT_S) != 0
        assert_nothing_left(processes)
