"""Clients and trainers that are silent, slow, close early or speak another protocol, while others
are served."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from urllib.parse import urlsplit

import pytest

from engine.errors import SlipstreamError
from engine.protocol import GenerateRequest, SamplingParams
from rollout.client import Client
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.loaded_server import family
from tests.helpers.serve_process import FAKE, ServerProcess
from tests.helpers.tiny_models import write_tiny

pytestmark = pytest.mark.slow

ANSWER_S = 60.0
REQUEST = b'{"input_ids": [5], "sampling_params": {"max_new_tokens": 300, "ignore_eos": true}}'
HEAD = (
    b"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n" % len(REQUEST)
)
STREAM = REQUEST.replace(b"{", b'{"stream": true, ', 1)
STREAM_HEAD = HEAD.replace(b": %d" % len(REQUEST), b": %d" % len(STREAM))
# What a client may do to a connection; each is then closed, or left open.
SENT = {
    "nothing": b"",
    "half a request line": b"POST /gen",
    "half the headers": HEAD[:60],
    "headers and no body": HEAD,
    "half the body": HEAD + REQUEST[:20],
    "another protocol": bytes(range(256)),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(50),
    "a header without end": b"GET /health HTTP/1.1\r\nX: " + b"a" * 100_000,
    "a thousand headers": b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 20_000,
    "lengths that differ": HEAD.replace(b"\r\n\r\n", b"\r\nContent-Length: 7\r\n\r\n") + REQUEST,
    "a negative length": HEAD.replace(b"Length: ", b"Length: -") + REQUEST,
    "no length": b"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "chunks that are none": HEAD.replace(
        b"Content-Length: %d" % len(REQUEST), b"Transfer-Encoding: chunked"
    )
    + b"zz\r\nabc",
    "a request and noise behind it": HEAD + REQUEST + b"\0\xff" * 500,
    "requests one behind another": (HEAD + REQUEST) * 3,
    "a stream": STREAM_HEAD + STREAM,
    "a whole request": HEAD + REQUEST,
}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(["-c", FAKE]) as found:
        yield found


def connect(server: ServerProcess) -> socket.socket:
    address = urlsplit(server.url)
    assert address.hostname and address.port
    return socket.create_connection((address.hostname, address.port), timeout=ANSWER_S)


def assert_serves(client: Client, num_tokens: int = 8) -> None:
    sampling = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
    (reply,) = client.generate(GenerateRequest(input_ids=[5], sampling_params=sampling))
    assert reply.output_ids == expected_tokens([5], num_tokens)


def assert_comes_to_rest(client: Client) -> None:
    """What the connections asked for has ended: nothing runs for a client that left."""
    for _ in range(2000):
        state = client.state()
        if state.num_running == state.num_waiting == 0:
            return
    raise AssertionError("requests of clients that left go on")


@pytest.mark.parametrize("what", SENT)
def test_connections_that_are_left_open_and_then_closed(server: ServerProcess, what: str) -> None:
    with server.client() as client, ExitStack() as held:
        for _ in range(20):
            peer = held.enter_context(closing(connect(server)))
            # A server may close on the first wrong byte.
            send_all(peer, SENT[what])
        assert_serves(client)
        held.close()
        assert_serves(client)
        assert_comes_to_rest(client)
    assert server.process.poll() is None


def send_all(peer: socket.socket, data: bytes) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):
        peer.sendall(data)


def test_clients_that_send_a_byte_at_a_time_are_answered_and_hold_up_nobody(
    server: ServerProcess,
) -> None:
    with server.client() as client, ExitStack() as held:
        slow = [held.enter_context(closing(connect(server))) for _ in range(8)]
        data = HEAD + REQUEST
        for at in range(len(data)):
            for peer in slow:
                peer.sendall(data[at : at + 1])
            if at % 50 == 0:
                assert_serves(client)
        for peer in slow:
            assert peer.recv(12) == b"HTTP/1.1 200"


def test_clients_that_do_not_read_their_streams(server: ServerProcess) -> None:
    with server.client() as client, ExitStack() as held:
        for _ in range(16):
            held.enter_context(closing(connect(server))).sendall(STREAM_HEAD + STREAM)
        assert_serves(client, 200)
        held.close()
        assert_comes_to_rest(client)


# --- peers that an engine is told to meet ---------------------------------------------------


def silent(peer: socket.socket) -> None:
    """Reads nothing, says nothing, stays."""
    peer.settimeout(ANSWER_S)
    try:
        while peer.recv(4096):
            pass
    except OSError:
        pass


def closes(peer: socket.socket) -> None:
    """Leaves at once."""


def closes_after_a_word(peer: socket.socket) -> None:
    """Leaves in the middle of the first message."""
    peer.settimeout(ANSWER_S)
    peer.recv(1)


def speaks_http(peer: socket.socket) -> None:
    """Is a web server."""
    peer.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    silent(peer)


def drips(peer: socket.socket) -> None:
    """Sends a byte now and then, for ever."""
    closed = threading.Event()
    try:
        while not closed.wait(0.2):
            peer.sendall(b"\0")
    except OSError:
        pass


@contextmanager
def host(behave: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port where somebody listens who behaves so. Ends when its connections were closed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            try:
                while True:
                    peer, _ = listener.accept()
                    threading.Thread(target=serve, args=(peer,), daemon=True).start()
            except OSError:
                return

        def serve(peer: socket.socket) -> None:
            with peer:
                behave(peer)

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of a tiny model: the fake engine meets nobody."""
    folder = tmp_path_factory.mktemp("model")
    write_tiny(folder, "llama", max_position_embeddings=2048)
    options = ["--model", str(folder), "--port", "0", "--device", "cpu", "--dtype", "float32"]
    with ServerProcess(["-m", "rollout", "serve", *options, "--kv-memory", "0.05"]) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("behave", [silent, closes, closes_after_a_word, speaks_http, drips])
def test_a_trainer_that_is_none_fails_its_join_and_nothing_else(
    real: ServerProcess, behave: Callable[[socket.socket], None]
) -> None:
    """Generation goes on meanwhile, and the join ends by its own deadline."""
    with host(behave) as port, real.client() as client, real.client() as trainer:
        body = {
            "master_address": "127.0.0.1",
            "master_port": port,
            "rank_offset": 1,
            "world_size": 2,
            "group_name": f"g{port}",
            "backend": "gloo",
            "timeout_s": 3.0,
        }
        failed: list[BaseException] = []

        def join() -> None:
            try:
                trainer.call("/init_weights_update_group", body)
            except SlipstreamError as error:
                failed.append(error)

        joining = threading.Thread(target=join)
        joining.start()
        sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
        served = 0
        while joining.is_alive() and served < 1000:
            client.generate(GenerateRequest(input_ids=[5], sampling_params=sampling))
            served += joining.is_alive()
        joining.join(ANSWER_S)
        assert not joining.is_alive(), "the join went on beyond its deadline"
        assert failed and str(failed[0])
        if behave in (silent, drips):
            assert served >= 1, "no request ended while the engine was joining"
        assert client.state().groups == []
    assert family(real.process.pid).keys() >= {"server", "leader"}
