"""A server over two ranks, halves of a model or copies of it: replies, an update into both by a
trainer that asks how many there are, and a rank that dies."""

import os
import signal
from pathlib import Path

import pytest

from engine.errors import EngineDead
from engine.protocol import GenerateRequest, SamplingParams
from rollout.client import Client
from tests.helpers.engines import drain, make_replica, request
from tests.helpers.foreign_trainer import ForeignTrainer
from tests.helpers.serve_process import ServerProcess, gone
from tests.helpers.tiny_models import tiny_hf, write_tiny

pytestmark = pytest.mark.slow

PROMPT = [3, 14, 15, 92, 65]


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def greedy(client: Client) -> list[int]:
    sampling = SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True)
    (reply,) = client.generate(GenerateRequest(input_ids=PROMPT, sampling_params=sampling))
    return reply.output_ids


def expected(folder: Path) -> list[int]:
    with make_replica(folder) as replica:
        replica.submit([request("r", PROMPT, max_new_tokens=12, temperature=0.0, ignore_eos=True)])
        return drain(replica)["r"].token_ids.tolist()


@pytest.mark.parametrize("flag", ["--tp", pytest.param("--dp", marks=pytest.mark.long)])
def test_two_ranks_serve_update_and_die_as_one(tmp_path: Path, flag: str) -> None:
    write_tiny(tmp_path / "old", "qwen3", seed=0)
    write_tiny(tmp_path / "new", "qwen3", seed=5)
    options = ["--model", str(tmp_path / "old"), flag, "2", "--port", "0", "--device", "cpu"]
    options += ["--dtype", "float32", "--kv-memory", "0.02"]
    with ServerProcess(["-m", "rollout", "serve", *options]) as server, server.client() as client:
        assert client.call("/get_world_size") == {"world_size": 2}
        info = client.call("/server_info")
        assert (info["num_gpus"], info[f"{flag[2:]}_size"]) == (2, 2)
        assert greedy(client) == expected(tmp_path / "old")

        tensors = [(name, p.detach()) for name, p in tiny_hf("qwen3", 5).named_parameters()]
        with ForeignTrainer(client, "both", num_ranks=2) as trainer:
            trainer.join()
            trainer.send(tensors, load_format="flattened_bucket", weight_version="new")
            client.call("/destroy_weights_update_group", {"group_name": "both"})
        assert greedy(client) == expected(tmp_path / "new")
        checked = client.call("/weights_checker", {"action": "checksum"})
        places = [rank["parallelism_info"] for rank in checked["ranks"]]
        assert [place[f"{flag[2:]}_rank"] for place in places] == [0, 1]
        assert sum(place["tp_rank"] + place["dp_rank"] for place in places) == 1

        (leader,) = server.children()
        (rank,) = children(leader)
        os.kill(rank, signal.SIGKILL)
        with pytest.raises(EngineDead, match="rank 1"):
            greedy(client)
            greedy(client)
        assert gone(leader)
        # A dead engine is for a supervisor to see.
        assert server.terminate() == 1
