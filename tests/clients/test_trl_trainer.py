"""TRL's GRPOTrainer in server mode, as it is, with weights that travel as pickled tensors.

Its own transfer is NCCL between CUDA devices. Everything else is TRL's: what the constructor reads
of the server, generation by ids, the logprobs that it compares with the trainer's own, the calls
around each update.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_client, vllm_generation

pytestmark = pytest.mark.slow

NUM_STEPS = 5


class PickledTransfer:
    """Stands in for the NCCL transfer of `VLLMClient`; the calls before and after are its own."""

    def __init__(self) -> None:
        self.num_updates = 0

    def connect(self, client: Any) -> None:
        """In place of `init_communicator`."""
        assert client.get_server_info()["weight_transfer_config"] is not None
        assert client.get_world_size() == 1

    def update(self, client: Any, metadata: list[Any], named: Iterator[Any]) -> None:
        """In place of `update_named_params`."""
        tensors = [(name, tensor.detach().clone()) for name, tensor in named]
        assert [name for name, _, _ in metadata] == [name for name, _ in tensors]
        payload = base64.b64encode(pickle.dumps(tensors)).decode()
        client._start_weight_update()
        client._post(
            f"{client.base_url}/update_weights_from_tensor",
            json={"serialized_named_tensors": [payload]},
        )
        client._finish_weight_update()
        self.num_updates += 1


@pytest.fixture
def transfer(monkeypatch: pytest.MonkeyPatch) -> PickledTransfer:
    """The transfer, in place of NCCL's. TRL asks whether vllm is installed; nothing here needs
    it."""
    found = PickledTransfer()
    for module in (vllm_client, vllm_generation):
        monkeypatch.setattr(module, "is_vllm_available", lambda *_, **__: True)
    client = vllm_client.VLLMClient
    monkeypatch.setattr(client, "init_communicator", lambda self, device=0: found.connect(self))
    monkeypatch.setattr(
        client,
        "update_named_params",
        lambda self, metadata, named: found.update(self, metadata, named),
    )
    return found


def reward(completions: list[Any], **_: Any) -> list[float]:
    """Share of letters."""
    texts = [turns[0]["content"] for turns in completions]
    return [sum(char.isalpha() for char in text) / max(len(text), 1) for text in texts]


def test_grpo_trains_unmodified(
    url: str, model_folder: Path, transfer: PickledTransfer, tmp_path: Path
) -> None:
    prompts = [[{"role": "user", "content": f"Say {number}"}] for number in range(16)]
    config = GRPOConfig(
        output_dir=str(tmp_path / "out"),
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=url,
        vllm_importance_sampling_correction=True,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=NUM_STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        bf16=False,
        use_cpu=True,
        save_strategy="no",
    )
    before = requests.get(f"{url}/get_weight_version").json()["weight_version"]
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
    )
    first = trainer.model.get_input_embeddings().weight.detach().clone()
    trainer.train()
    assert not torch.equal(first, trainer.model.get_input_embeddings().weight)
    steps = [row for row in trainer.state.log_history if "loss" in row]
    assert len(steps) == NUM_STEPS
    # What the server says of a token is what the trainer's own forward says, under the weights of
    # that step: the updates arrived, and the logprobs are those that TRL means.
    for row in steps:
        assert row["sampling/sampling_logp_difference/max"] < 1e-3
    assert transfer.num_updates >= NUM_STEPS - 1
    after = requests.get(f"{url}/get_weight_version").json()["weight_version"]
    assert int(after) - int(before) == transfer.num_updates
