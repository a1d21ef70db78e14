"""Messages between a replica's processes: structs in order, deadlines, bytes that are none."""

from pathlib import Path

import numpy as np
import pytest

from engine.errors import EngineDead
from engine.protocol import Call, GetState, LeaderMessage, Pause, Reply, Request, SamplingParams
from rollout.replica.ipc import Channel


@pytest.fixture
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    # A Unix socket path has at most 107 characters.
    folder: Path = tmp_path_factory.mktemp("c")
    return f"ipc://{folder}/s"


def test_structs_cross_in_order_with_their_arrays(endpoint: str) -> None:
    server = Channel.listen(endpoint, LeaderMessage)
    client = Channel.connect(endpoint, Reply)
    ids = np.array([1, 2, 3], np.int32)
    request = Request(rid="a", prompt_ids=ids, sampling=SamplingParams(top_k=3), seed=2**62)
    client.send([request, Call(id=7, command=Pause(mode="retract"))], timeout_s=60.0)
    client.send([Call(id=8, command=GetState())], timeout_s=60.0)
    first = server.receive(timeout_s=60.0)
    assert server.receive(timeout_s=60.0) == [Call(id=8, command=GetState())]
    assert first[0].prompt_ids.tolist() == [1, 2, 3]
    assert (first[0].seed, first[0].sampling) == (2**62, SamplingParams(top_k=3))
    assert first[1] == Call(id=7, command=Pause(mode="retract"))
    server.send([Reply(id=8)], timeout_s=60.0)
    assert client.receive(timeout_s=60.0) == [Reply(id=8)]
    client.close()
    server.close()


def test_deadlines_of_both_directions(endpoint: str) -> None:
    server = Channel.listen(endpoint, LeaderMessage)
    assert server.receive(timeout_s=0.01) == []
    with pytest.raises(EngineDead, match=r"within 0\.01 s"):
        server.send([Reply()], timeout_s=0.01)
    server.close()
    server.close()


def test_bytes_that_are_not_the_protocol(endpoint: str) -> None:
    server = Channel.listen(endpoint, Reply)
    client = Channel.connect(endpoint, Reply)
    client.send([Pause()], timeout_s=60.0)
    with pytest.raises(EngineDead, match="outside the protocol"):
        server.receive(timeout_s=60.0)
    client.close()
    server.close()
