"""Servers whose engine dies, and servers that are told to stop: who is told what, what is left."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.errors import EngineDead, NoVersion
from engine.protocol import (
    BeginUpdate,
    CommitUpdate,
    GenerateRequest,
    LoadFromDisk,
    Pause,
    SamplingParams,
)
from rollout.client import Client
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.peers import until
from tests.helpers.serve_process import ServerProcess, fake_server, gone

pytestmark = pytest.mark.slow

# It waits less than it would for an engine that does not end by itself.
IMPATIENT = """
import rollout.http.server, rollout.replica.spawned
rollout.http.server._PATIENCE_S = rollout.replica.spawned._LEAVE_S = 1.0
"""
PATIENT = """
import rollout.http.http_server
rollout.http.http_server.PATIENCE_S = 60.0
"""
# It says what it sends to its engine, and that it was told to leave.
TELLING = """
import sys, rollout.http.http_server as http_server, rollout.http.engine.link as link
def tell(what):
    sys.stderr.write(f"told {what}\\n")
class Link(link.ProcessLink):
    def post(self, messages):
        super().post(messages)
        for message in messages:
            tell(type(getattr(message, "command", message)).__name__)
class Server(http_server.PatientServer):
    def begin_to_leave(self, drain_s=0.0):
        super().begin_to_leave(drain_s)
        tell("to leave")
link.ProcessLink, http_server.PatientServer = Link, Server
"""
RESTARTING = fake_server(server='restart="on-failure"')
SHORT = GenerateRequest(input_ids=[5], sampling_params=SamplingParams(max_new_tokens=3))


def publish(client: Client, version: int, shift: int) -> None:
    client.send(BeginUpdate(version=version))
    client.send(LoadFromDisk(path=str(shift)))
    client.send(CommitUpdate(version=version))


def kill_leader(server: ServerProcess) -> int:
    (leader,) = server.children()
    os.kill(leader, signal.SIGKILL)
    assert gone(leader)
    return leader


def test_an_engine_that_had_taken_no_update_serves_again() -> None:
    with ServerProcess(["-c", RESTARTING]) as server, server.client() as client:
        assert client.generate(SHORT)[0].output_ids == expected_tokens([5], 3)
        leader = kill_leader(server)
        server.wait_for_another(client, 60.0)
        assert client.generate(SHORT)[0].output_ids == expected_tokens([5], 3)
        assert client.state().version == 0
        assert client.call("/ready") == {"status": "ready"}
        (other,) = server.children()
        assert other != leader
        assert server.terminate() == 0
        assert gone(other)


def test_an_engine_that_had_taken_an_update_waits_for_a_whole_version() -> None:
    with ServerProcess(["-c", RESTARTING]) as server, server.client() as client:
        publish(client, 7, shift=2)
        assert client.generate(SHORT)[0].output_ids == expected_tokens([5], 3, 2)
        kill_leader(server)
        server.wait_for_another(client, 60.0)
        with pytest.raises(NoVersion, match=r"version 7.*publish a whole version"):
            client.generate(SHORT)
        state = client.state()
        assert (state.version, state.num_waiting) == (7, 0), "versions go on from the last one"
        assert "version 7" in state.refusal
        with pytest.raises(Exception, match="version 7"):
            client.call("/ready")
        # The very version that was lost may come again.
        publish(client, 7, shift=2)
        assert client.generate(SHORT)[0].output_ids == expected_tokens([5], 3, 2)
        assert client.state().refusal == ""


def test_an_engine_that_cannot_be_started_again_ends_the_server() -> None:
    code = fake_server(engine='model="die"', server='restart="on-failure"')
    with ServerProcess(["-c", code]) as server:
        # Each engine leaves in its first step.
        deadline = time.monotonic() + 60
        with server.client() as client:
            while server.process.poll() is None and time.monotonic() < deadline:
                with pytest.raises(EngineDead):
                    client.generate(SHORT)
                time.sleep(0.05)
        assert server.process.wait(60) != 0
        server.close()
        assert any("failed 3 times" in line for line in server.lines)


def told(server: ServerProcess, what: str) -> None:
    """Until a server has said so."""
    until(lambda: f"told {what}\n" in server.lines)


def test_everybody_is_answered_before_a_silent_engine_is_ended() -> None:
    code = TELLING + IMPATIENT + fake_server(engine='model="hang"', server="drain_timeout_s=1")
    with ServerProcess(["-c", code]) as server:
        (leader,) = server.children()
        with server.client() as first, server.client() as second, ThreadPoolExecutor(2) as pool:
            generating = pool.submit(first.generate, SHORT)
            told(server, "Request")
            controlling = pool.submit(second.send, Pause())
            told(server, "Pause")
            assert server.terminate() == 0
            for asked in (generating, controlling):
                with pytest.raises(EngineDead, match="the server is shutting down"):
                    asked.result(120)
        assert gone(leader)


def test_a_second_signal_leaves_at_once() -> None:
    code = PATIENT + TELLING + fake_server(engine='model="hang"')
    with ServerProcess(["-c", code]) as server:
        (leader,) = server.children()
        with server.client() as client:
            asked = threading.Thread(target=_ignoring_errors, args=(client,), daemon=True)
            asked.start()
            told(server, "Request")
            server.process.send_signal(signal.SIGTERM)
            # Two that come at once may be one.
            told(server, "to leave")
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(60) == 128 + signal.SIGTERM
            assert gone(leader)
            asked.join(120)


def _ignoring_errors(client: Client) -> None:
    try:
        client.generate(SHORT)
    except EngineDead:
        return


@pytest.fixture(scope="module")
def hurried() -> Iterator[ServerProcess]:
    """A server that waits half a second for what a client sends."""
    with ServerProcess(["-c", fake_server(server="receive_timeout_s=0.5")]) as found:
        yield found


HEAD = b" HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    "parts,statuses",
    [
        ([b""], []),
        ([b"POST /generate HTTP/1.1\r\nHost: local"], [b"408"]),
        ([b"POST /generate" + HEAD + b"Content-Length: 50\r\n\r\n{"], [b"408"]),
        (
            [
                b"POST /continue_generation" + HEAD + b"Content-Length: 50\r\n"
                b"Content-Type: application/json\r\n\r\n{"
            ],
            [b"200"],
        ),
        ([b"GET /health" + HEAD + b"\r\n", b"GET /hea"], [b"200", b"408"]),
    ],
    ids=["nothing", "headers", "body", "a body nobody reads", "the next headers"],
)
def test_a_request_that_does_not_arrive_is_closed(
    hurried: ServerProcess, parts: list[bytes], statuses: list[bytes]
) -> None:
    host, port = hurried.url.removeprefix("http://").split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        for part in parts:
            connection.sendall(part)
            if len(parts) > 1 and part is parts[0]:
                received += connection.recv(65536)
        while data := connection.recv(65536):
            received += data
    assert re.findall(rb"HTTP/1.1 (\d+) ", received) == statuses
    with hurried.client() as client:
        assert client.generate(SHORT)[0].output_ids == expected_tokens([5], 3)
