"""Any JSON at any field of the control routes: 2xx or 4xx, and the server goes on."""

import base64
import random
from typing import Any

import pytest

from engine.protocol import JoinGroup, LoadFromDisk, ReceiveBroadcast, ReceiveIpc, Reply
from tests.helpers.control_calls import GROUP, bucket
from tests.helpers.http_app import run, serving

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 65536, 2**31, 2**63 - 1, 2**63, 2**64, 10**26, -(2**63) - 1, 0.5,
    -0.0, 1e308, "", " ", "x", "nan", "inf", "9" * 400, "é", "\u0000", "٣", "/" + "a" * 5000, [],
    [None], [[]], [[-1]], [[2**62, 2**62]], [[1] * 300], ["", ""], {}, {"a": 1}, [{"a": []}],
]  # fmt: skip

INFO = {"names": ["w"], "dtype_names": ["float32"], "shapes": [[2]], "packed": True}

ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/init_weights_update_group", {**GROUP, "group_name": "g", "backend": "gloo", "timeout_s": 1}),
    ("/destroy_weights_update_group", {"group_name": "g"}),
    ("/begin_weight_update", {"selector": "all", "partial": True}),
    ("/end_weight_update", {}),
    (
        "/update_weights_from_distributed",
        bucket(
            dtype="float32",
            load_format="flattened_bucket",
            weight_version="1",
            partial=True,
            abort_all_requests=False,
            selector="all",
            timeout_s=1.0,
        ),
    ),
    (
        "/update_weights_from_tensor",
        {"serialized_named_tensors": [base64.b64encode(b"x").decode()], "load_format": "direct"},
    ),
    ("/update_weights_from_disk", {"model_path": "/1", "weight_version": "2", "partial": True}),
    ("/update_weight_version", {"new_version": "3", "abort_all_requests": False}),
    ("/weights_checker", {"action": "checksum"}),
    ("/post_process_weights", {}),
    ("/pull_weights", {"target_version": 1, "local_checkpoint_dir": "/absent/l", "source_dir": ""}),
    ("/get_weights_by_name", {"name": "w", "truncate_size": 4}),
    ("/pause_generation", {"mode": "abort"}),
    ("/continue_generation", {}),
    ("/abort_request", {"rid": "r", "abort_all": False, "abort_message": "m"}),
    ("/release_memory_occupation", {"tags": ["kv_cache"]}),
    ("/resume_memory_occupation", {"tags": ["kv_cache"]}),
    ("/init_weight_transfer_engine", {"init_info": {**GROUP, "nccl_unique_id_b64": "AAAA"}}),
    ("/start_weight_update", {"is_checkpoint_format": True, "partial": True}),
    ("/update_weights", {"update_info": INFO, "weight_dir": None, "partial": True}),
    ("/finish_weight_update", {"weight_version": "4"}),
    ("/weight_checker", {"action": "checksum"}),
    ("/abort_requests", {"request_ids": ["r"]}),
]


def bodies(body: dict[str, Any], draw: random.Random) -> list[Any]:
    """Each field in turn as each odd value, the fields of its objects too, and odd bodies."""
    found: list[Any] = list(ODD)
    for field, value in body.items():
        found += [{**body, field: odd} for odd in ODD]
        found.append({key: other for key, other in body.items() if key != field})
        if isinstance(value, dict):
            found += [{**body, field: inner} for inner in bodies(value, draw)]
    return draw.sample(found, min(len(found), 60))


@pytest.mark.parametrize("path,body", ROUTES)
def test_any_json_in_any_field(path: str, body: dict[str, Any]) -> None:
    async def test() -> None:
        async with serving() as server:
            for kind in (ReceiveBroadcast, ReceiveIpc, JoinGroup, LoadFromDisk):
                server.link.answers[kind] = lambda _: Reply()
            for number, odd in enumerate(bodies(body, random.Random(path))):
                reply = await server.http.post(path, json=odd)
                assert 200 <= reply.status_code < 500, (odd, reply.text)
                if reply.status_code >= 400:
                    error = reply.json()["error"]
                    assert error["message"]
                    assert error["type"] not in ("InternalError", "SlipstreamError"), (odd, error)
                if number % 10 == 0:
                    assert (await server.post("/resume")).status_code < 500
                    assert (await server.get("/health")).status_code == 200
            body_is = {"input_ids": [1], "sampling_params": {"max_new_tokens": 2}}
            await server.post("/resume_memory_occupation")
            await server.post("/end_weight_update")
            # Released weights have no values until a whole version came.
            await server.post("/update_weights_from_disk", {"model_path": "/1"})
            await server.post("/continue_generation")
            await server.post("/continue_generation")
            assert len((await server.post("/generate", body_is)).json()["output_ids"]) == 2

    run(test)


@pytest.mark.parametrize(
    "path,body,field",
    [
        ("/init_weights_update_group", {**GROUP, "master_port": 70000}, "master_port"),
        ("/init_weights_update_group", {**GROUP, "master_port": -1}, "master_port"),
        ("/init_weights_update_group", {**GROUP, "world_size": 0}, "world_size"),
        ("/init_weights_update_group", {**GROUP, "rank_offset": -1}, "rank_offset"),
        ("/init_weights_update_group", {**GROUP, "timeout_s": 1e308}, "timeout_s"),
        ("/init_weights_update_group", {**GROUP, "timeout_s": "nan"}, "timeout_s"),
        ("/update_weights_from_distributed", bucket(timeout_s=0), "timeout_s"),
        ("/update_weights_from_distributed", bucket(shapes=[[-1]]), "shapes[0][0]"),
        ("/update_weights_from_distributed", bucket(shapes=[[2**39, 2**39]]), "shapes[0]"),
        ("/update_weights_from_distributed", bucket(names=[""]), "names[0]"),
        ("/update_weights_from_distributed", bucket(weight_version="9" * 1025), "weight_version"),
        ("/update_weights_from_tensor", {"serialized_named_tensors": ["é"]},
         "serialized_named_tensors[0]"),
        ("/init_weight_transfer_engine", {"init_info": {**GROUP, "nccl_unique_id_b64": "é"}},
         "init_info.nccl_unique_id_b64"),
        ("/update_weights_from_disk", {"model_path": ""}, "model_path"),
        ("/update_weights_from_disk", {"model_path": "weights"}, "model_path"),
        ("/update_weights_from_disk", {"model_path": "/a\nb"}, "model_path"),
        ("/update_weights_from_disk", {"model_path": "/a\u0000b"}, "model_path"),
        ("/update_weights_from_disk", {"model_path": "/" + "a" * 5000}, "model_path"),
        ("/update_weights", {"weight_dir": "../x"}, "weight_dir"),
        ("/pull_weights", {"target_version": -1, "local_checkpoint_dir": "/l"}, "target_version"),
        ("/pull_weights", {"target_version": 0, "local_checkpoint_dir": "/l", "source_dir": "s"},
         "source_dir"),
        ("/get_weights_by_name", {"name": "w", "truncate_size": 2**64}, "truncate_size"),
    ],
)  # fmt: skip
def test_what_no_engine_holds_is_refused_by_its_field(
    path: str, body: dict[str, Any], field: str
) -> None:
    async def test() -> None:
        async with serving() as server:
            reply = await server.post(path, body)
            assert (reply.status_code, reply.json()["error"]["field"]) == (400, field)
            assert server.commands() == []

    run(test)
