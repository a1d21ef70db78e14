"""Fields of the control routes that no engine could hold are refused by their names."""

from typing import Any

import pytest

from tests.helpers.control_calls import GROUP, bucket
from tests.helpers.http_app import run, serving


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
