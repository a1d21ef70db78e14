"""Bad bodies and faults: each its own typed error, and the server goes on."""

import re
from typing import Any

import pytest

from engine.errors import (
    GroupError,
)
from engine.protocol import (
    JoinGroup,
)
from tests.helpers.control_calls import GROUP, accept, bucket, refuse
from tests.helpers.http_app import run, serving


@pytest.mark.parametrize(
    "path,body,field",
    [
        ("/init_weights_update_group", {**GROUP, "master_port": "x"}, "master_port"),
        ("/init_weights_update_group", {"master_port": 1}, "master_address"),
        ("/update_weights_from_distributed", bucket(names=[]), "names"),
        ("/update_weights_from_distributed", bucket(dtypes=["float32", "int8"]), "dtypes"),
        ("/update_weights_from_distributed", bucket(dtypes=["complex64"]), "dtypes[0]"),
        ("/update_weights_from_distributed", bucket(shapes=[]), "shapes"),
        ("/update_weights_from_distributed", bucket(load_format="magic"), "load_format"),
        ("/update_weights_from_distributed", bucket(selector="draft"), "selector"),
        ("/update_weights_from_tensor", {"serialized_named_tensors": ["#"]},
         "serialized_named_tensors[0]"),
        ("/update_weights_from_tensor", {"serialized_named_tensors": ["", ""]},
         "serialized_named_tensors"),
        ("/release_memory_occupation", {"tags": ["everything"]}, "tags[0]"),
        ("/pause_generation", {"mode": "later"}, "mode"),
        ("/pull_weights", {"target_version": 3, "local_checkpoint_dir": "l"},
         "local_checkpoint_dir"),
        ("/weights_checker", {"action": "hope"}, "action"),
        ("/update_weights", {}, "update_info, weight_dir"),
        ("/update_weights", {"update_info": {}}, "names"),
        ("/start_weight_update", {"is_checkpoint_format": False}, "is_checkpoint_format"),
        ("/pause?mode=soon", {}, "mode"),
        ("/sleep?level=3", {}, "level"),
    ],
)  # fmt: skip
def test_a_bad_body_names_its_field_and_no_command_is_sent(
    path: str, body: dict[str, Any], field: str
) -> None:
    async def test() -> None:
        async with serving() as server:
            reply = await server.post(path, body)
            assert reply.status_code == 400
            assert reply.json()["error"]["field"] == field
            assert server.commands() == []

    run(test)


FAULTS: list[tuple[list[tuple[str, Any]], int, str, str]] = [
    # Steps before, then: status of the last, type and a part of the message of its error.
    ([("/command", {"type": "begin_update", "version": 1}),
      ("/command", {"type": "begin_update", "version": 2})], 409, "UpdateOrder", "open"),
    ([("/command", {"type": "set_version", "version": 7}),
      ("/command", {"type": "begin_update", "version": 7})], 409, "UpdateOrder", "go forward"),
    ([("/command", {"type": "set_version", "version": 7}),
      ("/command", {"type": "set_version", "version": 6})], 409, "UpdateOrder", "goes back"),
    ([("/release_memory_occupation", {}), ("/start_weight_update", {})],
     409, "MemoryReleased", "resume 'weights' first"),
    ([("/release_memory_occupation", {}), ("/update_weights_from_distributed", bucket())],
     400, "MemoryReleased", "resume 'weights' first"),
    ([("/sleep?level=1", {}), ("/update_weights", {"weight_dir": "/1"})],
     409, "MemoryReleased", "resume 'weights' first"),
    ([("/command", {"type": "begin_update", "version": 1}),
      ("/release_memory_occupation", {"tags": ["weights"]})], 400, "UpdateOrder", "is open"),
    ([("/command", {"type": "commit_update", "version": 1})], 409, "UpdateOrder", "no update"),
]  # fmt: skip


@pytest.mark.parametrize("steps,status,kind,message", FAULTS)
def test_a_fault_has_its_own_error_and_the_server_goes_on(
    steps: list[tuple[str, Any]], status: int, kind: str, message: str
) -> None:
    async def test() -> None:
        async with serving() as server:
            accept(server)
            for path, body in steps[:-1]:
                assert (await server.post(path, body)).status_code == 200, path
            reply = await server.post(*steps[-1])
            error = reply.json()["error"]
            assert (reply.status_code, error["type"]) == (status, kind)
            assert re.search(message, error["message"]), error["message"]
            assert error["field"]
            assert (await server.get("/health")).status_code == 200

    run(test)


@pytest.mark.parametrize("path", ["/init_weights_update_group", "/init_weight_transfer_engine"])
def test_a_group_that_does_not_form_is_an_error_with_the_ranks_name(path: str) -> None:
    async def test() -> None:
        async with serving() as server:
            error = GroupError("rank 2 did not come within 300 s", field="rank 2")
            refuse(server, JoinGroup, error)
            reply = await server.post(path, {**GROUP, "init_info": GROUP})
            found = reply.json()["error"]
            assert reply.status_code == 400
            assert (found["type"], found["field"]) == ("GroupError", "rank 2")

    run(test)
