"""`python -m rollout serve` as a user runs it: a server, a leader, and nothing left behind."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

import rollout.__main__ as cli
from engine.errors import EngineDead, InvalidRequest
from engine.protocol import GenerateRequest, GenerateResponse, Pause, Resume, SamplingParams
from rollout.http.config import ServeConfig
from rollout.launch import launch
from rollout.offline import expand, generate, load_tokenizer, respond
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.peers import until
from tests.helpers.rounding import logprob_bound
from tests.helpers.serve_process import FAKE, ROOT, ServerProcess, gone
from tests.helpers.tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.slow

OPTIONS = ["--port", "0", "--device", "cpu", "--dtype", "float32", "--max-running", "8"]
LOGPROB_FIELDS = (
    "output_token_logprobs",
    "output_top_logprobs",
    "input_token_logprobs",
    "input_top_logprobs",
)
LONG = SamplingParams(max_new_tokens=3000, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tests.helpers.tiny_models import write_tiny

    folder = tmp_path_factory.mktemp("model")
    write_tiny(folder, "qwen3", vocab_size=300, max_position_embeddings=4096, eos_token_id=299)
    tiny_tokenizer().write_hf(folder)
    return str(folder)


@pytest.fixture(scope="module")
def server(model: str) -> Iterator[ServerProcess]:
    options = [*OPTIONS, "--model", model, "--kv-memory", "0.05"]
    with ServerProcess(["-m", "rollout", "serve", *options]) as found:
        yield found


@pytest.fixture
def fake() -> Iterator[ServerProcess]:
    with ServerProcess(["-c", FAKE]) as found:
        yield found


@pytest.mark.slow
def test_replies_are_those_of_the_engine(server: ServerProcess, model: str) -> None:
    """Over HTTP and in process: the same ids and text, and logprobs that are the engine's float32
    values, unrounded. Which requests share a step depends on when they arrive, so between the two
    a logprob differs by the order of its sums."""
    wires, bound = sampled_wires(), logprob_bound(AutoConfig.from_pretrained(model))
    with server.client() as client:
        served = client.generate(wires)
    for reply, expected in zip(served, in_process(model, wires), strict=True):
        assert reply.output_ids == expected.output_ids
        assert reply.text == expected.text
        for name in LOGPROB_FIELDS:
            got, ids = numbers(reply.meta_info[name])
            want, expected_ids = numbers(expected.meta_info[name])
            assert ids == expected_ids, name
            np.testing.assert_allclose(got, want, rtol=0, atol=bound, err_msg=name)
            np.testing.assert_array_equal(got.astype(np.float32), got, name)


def sampled_wires() -> list[GenerateRequest]:
    """Two samples of each of three texts, with every logprob there is."""
    return [
        GenerateRequest(
            text=text,
            rid=f"r{number}",
            return_logprob=True,
            logprob_start_len=0,
            top_logprobs_num=3,
            sampling_params=SamplingParams(
                max_new_tokens=24, temperature=0.8, sampling_seed=number, n=2
            ),
        )
        for number, text in enumerate(["Hello there.", "One two three", "x"])
    ]


def in_process(model: str, wires: list[GenerateRequest]) -> list[GenerateResponse]:
    """What a replica in this process, with the server's options, answers."""
    args = cli.parse(["serve", *OPTIONS, "--model", model, "--kv-memory", "0.05"])
    assert isinstance(args, ServeConfig)
    tokenizer = load_tokenizer(model)
    with launch(args.engine) as replica:
        pairs = [
            (wire, request)
            for wire in wires
            for request in expand(wire, tokenizer, replica.state(), 0)
        ]
        outputs = generate(replica, [request for _, request in pairs], tokenizer=tokenizer)
    return [
        respond(wire, request, output, tokenizer)
        for (wire, request), output in zip(pairs, outputs, strict=True)
    ]


def numbers(entries: Any) -> tuple[np.ndarray, list[int]]:
    """The logprobs (nan for none) and the ids of all `[logprob, id, text]` in the lists."""
    found = list(leaves(entries))
    logprobs = [np.nan if entry[0] is None else entry[0] for entry in found]
    return np.array(logprobs), [entry[1] for entry in found]


def leaves(entries: Any) -> Iterator[list[Any]]:
    """Every `[logprob, id, text]` in lists of them, or in lists of those, or None, in order."""
    if entries is None:
        return
    if len(entries) == 3 and isinstance(entries[1], int):
        yield entries
        return
    for entry in entries:
        yield from leaves(entry)


@pytest.mark.slow
def test_the_server_process_has_no_torch(server: ServerProcess) -> None:
    assert "libtorch" not in Path(f"/proc/{server.process.pid}/maps").read_text()
    (leader,) = server.children()
    assert "libtorch" in Path(f"/proc/{leader}/maps").read_text()


@pytest.mark.slow
def test_a_stream_that_is_closed_is_aborted(server: ServerProcess) -> None:
    with server.client() as client:
        before = client.state().num_output_tokens
        stream = client.stream(GenerateRequest(text="Hello", sampling_params=LONG))
        with closing(stream):
            lengths = [len(next(stream).output_ids) for _ in range(3)]
        # A server that has little of the processor sends several tokens in one frame.
        assert lengths == sorted({*lengths})
        until(lambda: client.state().num_running == 0)
        state = client.state()
        assert state.num_waiting == 0
        assert state.num_output_tokens - before < 3000


@pytest.mark.slow
def test_the_client_speaks_every_kind_of_route(server: ServerProcess) -> None:
    with server.client() as client:
        client.wait_ready(5.0)
        assert client.call("/v1/models")["data"][0]["max_model_len"] == 4096
        client.send(Pause())
        assert client.state().paused
        assert client.call("/is_paused") == {"is_paused": True}
        client.send(Resume())
        with pytest.raises(InvalidRequest) as caught:
            client.generate(GenerateRequest(input_ids=[4000]))
        assert caught.value.field == "input_ids"
        with pytest.raises(InvalidRequest, match="item 1"):
            client.generate([GenerateRequest(text="a"), GenerateRequest(text="")])


def test_sigterm_ends_the_server_and_its_leader_while_requests_run(fake: ServerProcess) -> None:
    (leader,) = fake.children()
    with fake.client() as client:
        client.send(Pause())
        waiting = subprocess.Popen(
            ["curl", "-s", "-N", f"{fake.url}/generate", "-d", '{"input_ids":[1],"stream":true}'],
            stdout=subprocess.DEVNULL,
        )
        until(lambda: client.state().num_waiting == 1)
    assert fake.terminate() == 0
    assert gone(leader)
    waiting.wait(60)


def test_a_leader_that_is_killed_shows_in_every_answer_and_in_the_exit_code(
    fake: ServerProcess,
) -> None:
    (leader,) = fake.children()
    with fake.client() as client:
        body = GenerateRequest(input_ids=[5], sampling_params=SamplingParams(max_new_tokens=3))
        assert client.generate(body)[0].output_ids == expected_tokens([5], 3)
        os.kill(leader, signal.SIGKILL)
        with pytest.raises(EngineDead, match="signal 9"):
            client.generate(GenerateRequest(input_ids=[5], sampling_params=LONG))
        with pytest.raises(EngineDead, match="signal 9"):
            client.wait_ready(0.0)
    assert fake.process.wait(60) != 0, "a supervisor must notice"
    fake.close()
    (line,) = [line for line in fake.lines if "the engine is gone" in line]
    assert "signal 9" in line, "the reason comes before the log's tail"


def test_a_killed_server_leaves_no_leader(fake: ServerProcess) -> None:
    (leader,) = fake.children()
    fake.process.kill()
    fake.process.wait(60)
    assert gone(leader)


def test_a_port_in_use_is_one_line_before_the_model_is_loaded() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "rollout", "serve", "--model", "absent", "--port", port],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("InvalidRequest (--host, --port): cannot bind 127.0.0.1")
    assert done.stderr.count("\n") == 1
