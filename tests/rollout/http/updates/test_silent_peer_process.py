"""A served engine that is told to meet somebody who says nothing: requests do not notice."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from engine.errors import SlipstreamError
from engine.protocol import JoinGroup, LeaveGroup, Pause, Resume
from tests.helpers import peers
from tests.helpers.peers import listening
from tests.helpers.serve_process import ServerProcess
from tests.helpers.tiny_models import write_tiny

pytestmark = pytest.mark.slow

BODY = {
    "input_ids": [3, 14, 15, 92, 65],
    "sampling_params": {"max_new_tokens": 40, "temperature": 0.0, "ignore_eos": True},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("model")
    write_tiny(folder, "llama", seed=0)
    options = ["--model", str(folder / "config.json"), "--load-format", "random"]
    options += ["--device", "cpu", "--dtype", "float32", "--kv-memory", "0.02", "--port", "0"]
    with ServerProcess(["-m", "rollout", "serve", *options]) as found:
        yield found


@pytest.mark.parametrize("act", [peers.silent, peers.cunning], ids=lambda act: act.__name__)
def test_requests_and_commands_are_served_while_a_group_forms(
    act: peers.Act, server: ServerProcess
) -> None:
    with listening(act) as port, server.client() as client:
        expected = client.call("/generate", BODY)["output_ids"]
        meeting = JoinGroup(
            name="g",
            address="127.0.0.1",
            port=port,
            rank_offset=1,
            world_size=2,
            backend="gloo",
        )
        ended: list[Any] = []

        def form() -> None:
            with server.client() as own:
                try:
                    ended.append(own.send(meeting))
                except SlipstreamError as error:
                    ended.append(error)

        forming = threading.Thread(target=form, daemon=True)
        forming.start()
        while client.state().receiving != ["join_group"]:
            assert not ended, ended
        for _ in range(3):
            assert client.call("/generate", BODY)["output_ids"] == expected
            client.send(Pause(mode="retract"))
            client.send(Resume())
        assert not ended, "the group stopped forming, so nothing was shown"
        client.send(LeaveGroup(name="g"))
        forming.join(60)
        (error,) = ended
        assert "'g' is joined anew or left" in str(error)
        assert client.call("/generate", BODY)["output_ids"] == expected
