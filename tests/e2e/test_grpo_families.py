"""The recipe on a folder of every served family, as users bring them: bfloat16 safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import recipes.run.opening
from engine.models.registry import ARCHITECTURES
from recipes.environments.base import Environment
from recipes.grpo import main
from recipes.run.run_folder import RunFolder
from recipes.types import Problem
from tests.helpers.char_model import CharAddition
from tests.helpers.tiny_models import write_tiny
from tests.helpers.tiny_tokenizer import EOS_ID, tiny_tokenizer

pytestmark = pytest.mark.slow

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}
# A run of each takes seconds: of the families with experts those that differ there.
TIED = [family for family in FAMILIES if "moe" not in family and family != "mixtral"]
WRITTEN_BEFORE = [*TIED, "mixtral"]
# One of a kind in every run of the suite, the others among the long tests.
FIRST = {"llama", "mixtral"}


def rarely(family: str, *more: object) -> Any:
    """Arguments of a test that is long for all but the first families."""
    return pytest.param(family, *more, marks=() if family in FIRST else pytest.mark.long)


def test_every_served_family_is_here() -> None:
    assert sorted(FAMILIES.values()) == sorted(ARCHITECTURES)


class ShortReply(CharAddition):
    """Rewards what a random model does now and then. No file of prompts: its answers would be
    graded by processes that take longer to start than the run to end."""

    def verify(self, reply: str, problem: Problem) -> float:
        return float(len(reply) % 2)


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    def environment(task: str, *_: object, **__: object) -> Environment:
        return ShortReply()

    monkeypatch.setattr(recipes.run.opening, "select_environment", environment)


def flags(tmp_path: Path, *more: str) -> list[str]:
    text = "--steps 2 --eval-every 0 --eval-prompts 4 --checkpoint-every 1 --max-new-tokens 6"
    text += " --prompts-per-step 2 --samples 4 --kv-memory-gb 0.02"
    return [*text.split(), "--out", str(tmp_path / "run"), *more]


def write_model(folder: Path, family: str, **options: Any) -> None:
    # Some classes take a padding token far beyond this vocabulary where a file names none.
    sizes = {"vocab_size": 300, "eos_token_id": EOS_ID, "pad_token_id": 0}
    shards = {"max_shard_size": "100KB"}
    write_tiny(folder, family, dtype=torch.bfloat16, **sizes, **shards, **options)
    tiny_tokenizer().write_hf(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def check_run(tmp_path: Path, family: str) -> None:
    """Two steps, and a model that transformers reads."""
    folder = tmp_path / "model"
    assert main(flags(tmp_path, "--model", str(folder), "--dtype", "bfloat16")) == 0
    run = RunFolder(tmp_path / "run", active=False)
    assert [row["weight_version"] for row in run.read_metrics()] == [1, 2]
    assert json.loads((run.path / "summary.json").read_text())["dtype"] == "bfloat16"
    saved = AutoModelForCausalLM.from_pretrained(run.model, dtype="auto")
    assert type(saved).__name__ == FAMILIES[family]
    assert saved.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(run.model).encode("a") == [64]


@pytest.mark.parametrize(
    ("family", "tied"),
    [*((family, False) for family in sorted(FAMILIES)), *(rarely(family, True) for family in TIED)],
)
def test_two_steps_from_bfloat16(family: str, tied: bool, tmp_path: Path) -> None:
    write_model(tmp_path / "model", family, tie_word_embeddings=tied)
    check_run(tmp_path, family)


def edit_config(folder: Path, **changes: Any) -> None:
    """Replace keys of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: v for key, v in config.items() if v is not None}))


@pytest.mark.parametrize("family", [rarely(family) for family in WRITTEN_BEFORE])
def test_configurations_as_they_were_written_before(family: str, tmp_path: Path) -> None:
    """transformers 4 wrote `torch_dtype` and the parameters of the rotary embedding one by one;
    most folders on hubs are of that kind."""
    write_model(tmp_path / "model", family)
    edit_config(
        tmp_path / "model",
        dtype=None,
        torch_dtype="bfloat16",
        rope_parameters=None,
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )
    check_run(tmp_path, family)


def test_files_that_hold_more_than_the_parameters(tmp_path: Path) -> None:
    """Older folders hold the inverse frequencies of each layer, and tied heads twice."""
    folder = tmp_path / "model"
    write_model(folder, "llama", tie_word_embeddings=True)
    for path in folder.glob("*.safetensors*"):
        if path.suffix == ".json":
            path.unlink()
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors.update(load_file(path))
        path.unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    check_run(tmp_path, "llama")
