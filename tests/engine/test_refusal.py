"""An engine that was told not to serve the weights that it loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import CacheConfig, EngineConfig
from engine.errors import UpdateOrder
from rollout.launch import launch
from tests.helpers.engines import drain, request
from tests.helpers.tiny_models import tiny_hf, write_tiny
from trainer_bridge import push


@pytest.mark.parametrize("version", [3, 4])
def test_it_serves_once_the_last_version_or_a_later_one_is_published(
    tmp_path: Path, version: int
) -> None:
    write_tiny(tmp_path, "qwen2")
    config = EngineConfig(
        model=str(tmp_path),
        device="cpu",
        dtype="float32",
        weight_version=3,
        refusal="publish version 3 again",
        cache=CacheConfig(num_pages=64, page_size=8),
    )
    with launch(config) as replica:
        replica.submit([request("a", [1, 2, 3], seed=1)])
        finish = drain(replica)["a"].finish
        assert finish is not None
        assert finish.error == "NoVersion"
        new = tiny_hf("qwen2", seed=1)
        with pytest.raises(UpdateOrder):
            push(new, 2, replica)
        assert replica.state().refusal == "publish version 3 again"
        push(new, version, replica)
        assert (replica.state().refusal, replica.state().version) == ("", version)
        replica.submit([request("b", [1, 2, 3], seed=1)])
        assert {span.version for span in drain(replica)["b"].spans} == {version}
