"""A trainer's model starts from the very weights the engine loads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError
from rollout.launch import read_checkpoint
from tests.helpers.tiny_models import write_tiny, write_tiny_gguf
from trainer_bridge import load_causal_lm, load_classifier
from trainer_bridge.adapters.plain import named_tensors

pytestmark = pytest.mark.slow

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

FAMILIES = ["llama", "qwen2", "qwen3", "olmo2", "smollm3", "gemma3"]


FOLDERS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    ("mistral", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {}),
    ("olmo2", {}),
    ("smollm3", {"tie_word_embeddings": True}),
    ("gemma3", {"tie_word_embeddings": True}),
]


@pytest.mark.parametrize("arch,options", FOLDERS)
def test_a_folder(arch: str, options: dict[str, Any], tmp_path) -> None:
    """Parameters, buffers that no file holds, and ties are those of the model that was saved."""
    original = write_tiny(tmp_path, arch, **options)
    checkpoint = read_checkpoint(str(tmp_path))
    drawn = torch.get_rng_state()
    model = load_causal_lm(checkpoint.hf_config, checkpoint.tensors)
    assert torch.equal(torch.get_rng_state(), drawn), "weights were drawn that the file then gave"
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == options.get("tie_word_embeddings", False)
    buffers, wanted = dict(model.named_buffers()), dict(original.named_buffers())
    assert buffers.keys() == wanted.keys() and len(wanted) >= 1
    for name, buffer in wanted.items():
        assert torch.equal(buffers[name], buffer), name
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits)


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_gguf_file(arch: str, tmp_path) -> None:
    original = write_tiny_gguf(tmp_path / "m.gguf", arch, num_hidden_layers=5)
    checkpoint = read_checkpoint(str(tmp_path / "m.gguf"))
    model = load_causal_lm(checkpoint.hf_config, checkpoint.tensors)
    ids = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, atol=1e-4, rtol=0)


def test_what_the_engine_passes_over_is_left_out(tmp_path) -> None:
    write_tiny(tmp_path, "llama")
    (path,) = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, path, metadata={"format": "pt"})
    checkpoint = read_checkpoint(str(tmp_path))
    load_causal_lm(checkpoint.hf_config, checkpoint.tensors)


def test_a_gguf_file_can_be_saved_again(tmp_path) -> None:
    write_tiny_gguf(tmp_path / "m.gguf", "llama", quant="F32")
    checkpoint = read_checkpoint(str(tmp_path / "m.gguf"))
    model = load_causal_lm(checkpoint.hf_config, checkpoint.tensors)
    model.save_pretrained(tmp_path / "saved")
    again = read_checkpoint(str(tmp_path / "saved"))
    saved = dict(again.tensors)
    for name, value in named_tensors(model):
        torch.testing.assert_close(saved[name], value)


def test_random_weights_are_the_engines(tmp_path) -> None:
    write_tiny(tmp_path, "llama")
    first = dict(read_checkpoint(str(tmp_path / "config.json"), "random", seed=3).tensors)
    second = dict(read_checkpoint(str(tmp_path / "config.json"), "random", seed=3).tensors)
    other = dict(read_checkpoint(str(tmp_path / "config.json"), "random", seed=4).tensors)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(first[name], second[name])
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch,options", FOLDERS)
def test_a_folder_is_what_transformers_loads_bit_for_bit(
    arch: str, options: dict[str, Any], dtype: torch.dtype, tmp_path
) -> None:
    write_tiny(tmp_path, arch, **options)
    checkpoint = read_checkpoint(str(tmp_path))
    model = load_causal_lm(checkpoint.hf_config, checkpoint.tensors, dtype=dtype)
    wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for kind in ("named_parameters", "named_buffers"):
        found, expected = (dict(getattr(m, kind)()) for m in (model, wanted))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            same = found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
            assert same and found[name].requires_grad == tensor.requires_grad, name


@pytest.mark.parametrize("arch", FAMILIES)
def test_no_tensor_may_be_missing(arch: str, tmp_path) -> None:
    """Nothing else gives a parameter its values."""
    write_tiny(tmp_path, arch)
    checkpoint = read_checkpoint(str(tmp_path))
    tensors = dict(checkpoint.tensors)
    for name in tensors:
        rest = [(other, tensor) for other, tensor in tensors.items() if other != name]
        with pytest.raises(CheckpointError, match="no tensor for") as refusal:
            load_causal_lm(checkpoint.hf_config, rest)
        assert refusal.value.field == name


@pytest.mark.parametrize("how", ["unknown", "missing", "shape"])
def test_tensors_that_do_not_fit_are_named(how: str, tmp_path) -> None:
    write_tiny(tmp_path, "llama")
    checkpoint = read_checkpoint(str(tmp_path))
    tensors = dict(checkpoint.tensors)
    name = "model.norm.weight"
    if how == "unknown":
        tensors["strange"] = tensors[name]
    elif how == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:-1]
    with pytest.raises(CheckpointError) as refusal:
        load_causal_lm(checkpoint.hf_config, tensors.items())
    assert refusal.value.field == ("strange" if how == "unknown" else name)


EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@pytest.mark.parametrize(
    "name,why", [(NORM, "came twice"), (HEAD, "differs from"), (NORM, "not a float")]
)
def test_tensors_that_contradict_each_other_or_are_no_weights_are_named(
    name: str, why: str, tmp_path
) -> None:
    """As the engine refuses them: the two would start from other numbers."""
    write_tiny(tmp_path, "llama", tie_word_embeddings=True)
    checkpoint = read_checkpoint(str(tmp_path))
    tensors = list(checkpoint.tensors)
    values = dict(tensors)
    again = values[EMBED if name == HEAD else name]
    if why == "not a float":
        tensors = [(n, t.to(torch.int8) if n == name else t) for n, t in tensors]
    else:
        tensors.append((name, again + 1))
    with pytest.raises(CheckpointError, match=why) as refusal:
        load_causal_lm(checkpoint.hf_config, tensors)
    assert refusal.value.field == name


def test_a_tied_tensor_may_come_under_either_name_or_both(tmp_path) -> None:
    write_tiny(tmp_path, "llama", tie_word_embeddings=True)
    checkpoint = read_checkpoint(str(tmp_path))
    values = dict(checkpoint.tensors)
    tied = values.pop(EMBED)
    for names in ([HEAD], [EMBED, HEAD], [HEAD, EMBED]):
        tensors = [*values.items(), *((name, tied) for name in names)]
        model = load_causal_lm(checkpoint.hf_config, tensors)
        assert torch.equal(model.lm_head.weight, tied)
        assert torch.equal(model.model.embed_tokens.weight, tied)


def test_names_of_wrapped_models_are_bare() -> None:
    inner = torch.nn.Linear(2, 2)
    compiled = torch.nn.Module()
    compiled._orig_mod = inner
    assert [name for name, _ in named_tensors(compiled)] == ["weight", "bias"]
    parallel = torch.nn.Module()
    parallel.module = inner
    assert [name for name, _ in named_tensors(parallel)] == ["weight", "bias"]


def test_rotary_frequencies_that_transformers_cannot_scale_are_refused() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "frequency_divisors": [1.0, 8.0]}
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
        load_causal_lm({"architectures": ["LlamaForCausalLM"], "rope_parameters": rope}, [])


@pytest.mark.parametrize("arch", ["llama", "mistral", *FAMILIES[1:]])
def test_a_classifier(arch: str, tmp_path) -> None:
    original = write_tiny(tmp_path, arch, classifier=True, num_labels=1)
    checkpoint = read_checkpoint(str(tmp_path))
    model = load_classifier(checkpoint.hf_config, checkpoint.tensors)
    assert type(model) is type(original)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits)


def test_a_classifier_is_no_causal_model_nor_the_other_way_round(tmp_path) -> None:
    write_tiny(tmp_path / "scores", classifier=True, num_labels=1)
    write_tiny(tmp_path / "writes")
    for load, folder in ((load_causal_lm, "scores"), (load_classifier, "writes")):
        checkpoint = read_checkpoint(str(tmp_path / folder))
        with pytest.raises(CheckpointError, match="head") as caught:
            load(checkpoint.hf_config, checkpoint.tensors)
        assert caught.value.field == "architectures"
