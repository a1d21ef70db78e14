"""The leader reads routes before a command takes the pages, and while steps are held back."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from engine.protocol import (
    Abort,
    BeginUpdate,
    CommitUpdate,
    FlushCache,
    LoadFromDisk,
    Pause,
    ReleaseMemory,
    Request,
    RequestOutput,
    Resume,
    ResumeMemory,
    SetVersion,
    decode,
    encode,
)
from rollout.replica.inline import InlineReplica
from rollout.replica.spawned import ProcessReplica
from tests.helpers.engines import drain
from tests.helpers.fake_copies import FakeCopies
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.mock_routes import fake_routes
from tests.helpers.replicas import FACTORY, fake_config, inline, make_request

PROMPT = [5, 6, 7, 8, 9]


def routed(rid: str, prompt: list[int] = PROMPT, **sampling: object) -> Request:
    return msgspec.structs.replace(
        make_request(rid, prompt, **sampling), return_routed_experts=True
    )


def check(output: RequestOutput, prompt: list[int] = PROMPT) -> None:
    tokens = [*prompt, *output.token_ids.tolist()]
    np.testing.assert_array_equal(output.routed_experts, fake_routes(tokens))


def running(num_steps: int = 4, *, overlap: bool = False) -> InlineReplica:
    replica = inline("experts", routes=True, overlap=overlap)
    replica.submit([routed("a", max_new_tokens=50)])
    for _ in range(num_steps):
        replica.step()
    return replica


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "command",
    [Abort(rid="a"), Abort(all=True), Pause(mode="abort"), ReleaseMemory(pause="abort")],
    ids=["abort", "abort all", "pause", "release"],
)
def test_a_command_that_ends_a_request(command: object, overlap: bool) -> None:
    replica = running(overlap=overlap)
    replica.send(command)
    output = drain(replica)["a"]
    assert output.finish.type == "abort" and len(output.token_ids) > 1
    check(output)
    assert not replica.idle() or replica.step() == []


def test_pages_are_read_before_memory_goes() -> None:
    replica = running()
    replica.send(Pause(mode="retract"))
    replica.send(FlushCache())
    replica.send(ReleaseMemory())
    # Nothing can be read any more, and nothing has to be.
    replica.send(Abort(rid="a"))
    check(drain(replica)["a"])


@pytest.mark.parametrize("mode", ["in_place", "shadow"])
def test_steps_that_are_held_back_hold_back_no_routes(mode: str) -> None:
    replica = running()
    replica.send(BeginUpdate(version=1, mode=mode))
    replica.send(Abort(rid="a"))
    check(drain(replica)["a"])
    replica.send(LoadFromDisk(path="step_3"))
    replica.send(CommitUpdate(version=1))
    replica.submit([routed("b")])
    output = drain(replica)["b"]
    tokens = [*PROMPT, *expected_tokens(PROMPT, 8, 3)]
    assert output.token_ids.tolist() == tokens[5:]
    np.testing.assert_array_equal(output.routed_experts, fake_routes(tokens, version=3))


def test_a_new_version_while_requests_run() -> None:
    replica = running(6)
    replica.send(SetVersion(version=1))
    replica.send(ReleaseMemory(pause="retract"))
    replica.send(ResumeMemory())
    replica.send(BeginUpdate(version=2))
    replica.send(LoadFromDisk(path="step_0"))
    replica.send(CommitUpdate(version=2))
    replica.send(Resume())
    output = drain(replica)["a"]
    check(output)
    assert output.num_retractions == 1 and len(output.token_ids) == 50


def test_copies_of_the_model_read_their_own() -> None:
    config = fake_config("experts", routes=True)
    config = replace(config, parallel=replace(config.parallel, dp_size=2))
    with InlineReplica(config, FakeCopies(config)) as replica:
        asked = [routed(f"r{i}", [i, *PROMPT], max_new_tokens=3 + i) for i in range(5)]
        replica.submit(asked)
        outputs = drain(replica)
    for request in asked:
        check(outputs[request.rid], request.prompt_ids.tolist())


def test_they_cross_processes() -> None:
    config = fake_config("experts", routes=True)
    with ProcessReplica(config, factory=FACTORY, start_s=60.0, reply_s=60.0) as replica:
        replica.submit([routed("a"), make_request("b", [4])])
        outputs = drain(replica)
        assert replica.state().experts.layers == [1, 2]
    check(outputs["a"])
    assert outputs["b"].routed_experts is None
    again = decode(encode(outputs["a"]), RequestOutput)
    np.testing.assert_array_equal(again.routed_experts, outputs["a"].routed_experts)
