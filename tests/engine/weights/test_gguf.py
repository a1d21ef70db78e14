"""GGUF files: every tensor type, llama.cpp's row order, metadata, broken files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from engine.errors import CheckpointError, UnknownArchitecture
from engine.models.gguf_families import find_family
from engine.models.gguf_file import GGUFFile
from engine.models.locate import locate
from engine.weights.sources import gguf as gguf_source
from tests.helpers.dense_context import dense_logits
from tests.helpers.gguf_writer import add_key
from tests.helpers.load_tiny import load_path
from tests.helpers.tiny_models import write_tiny_gguf

WIDE = {"hidden_size": 256, "intermediate_size": 256}


def _assert_logits_equal(path: Path, reference: Any) -> None:
    ids_T = torch.randint(0, 100, (63,), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected_TV = reference(ids_T[None]).logits[0]
    torch.testing.assert_close(dense_logits(load_path(path), ids_T), expected_TV, rtol=0, atol=1e-4)


@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_logits_of_every_simple_type(quant: str, tmp_path: Path) -> None:
    reference = write_tiny_gguf(tmp_path / "tiny.gguf", quant=quant)
    _assert_logits_equal(tmp_path / "tiny.gguf", reference)


@pytest.mark.parametrize("quant", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_logits_of_k_quants(quant: str, tmp_path: Path) -> None:
    reference = write_tiny_gguf(tmp_path / "tiny.gguf", quant=quant, **WIDE)
    _assert_logits_equal(tmp_path / "tiny.gguf", reference)


@pytest.mark.parametrize(
    ("arch", "overrides"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 4}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("olmo2", {}),
        ("olmo2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
        ("smollm3", {"num_hidden_layers": 5}),
        ("smollm3", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
        ("gemma3", {}),
        ("gemma3", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
        ("gemma3", {"sliding_window": 200}),
    ],
)
def test_logits_of_every_architecture(arch: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    reference = write_tiny_gguf(tmp_path / "tiny.gguf", arch, **overrides)
    _assert_logits_equal(tmp_path / "tiny.gguf", reference)


def test_the_row_order_is_the_one_transformers_undoes(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", quant="Q8_0")
    reference = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32
    ).eval()
    _assert_logits_equal(tmp_path / "tiny.gguf", reference)


def test_metadata_becomes_the_configuration(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", "qwen3", num_hidden_layers=3)
    config = locate(tmp_path / "tiny.gguf").config
    assert config.architecture == "Qwen3ForCausalLM"
    assert (config.num_layers, config.head_dim, config.vocab_size) == (3, 32, 100)
    assert (config.eos_token_ids, config.bos_token_id) == ((2,), 1)
    assert config.max_position == 128
    assert not config.tie_word_embeddings


def test_rope_scaling_metadata(tmp_path: Path) -> None:
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    write_tiny_gguf(tmp_path / "linear.gguf", metadata=linear)
    rope = locate(tmp_path / "linear.gguf").config.rope
    assert (rope.rope_type, rope.factor) == ("linear", 4.0)
    yarn = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32.0,
        "rope.scaling.attn_factor": 2.0,
    }
    write_tiny_gguf(tmp_path / "yarn.gguf", metadata=yarn)
    rope = locate(tmp_path / "yarn.gguf").config.rope
    assert (rope.rope_type, rope.factor, rope.original_max_position) == ("yarn", 4.0, 32)
    assert rope.attention_factor == pytest.approx(2 * (1 + 0.1 * np.log(4)))
    other = {"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}
    write_tiny_gguf(tmp_path / "other.gguf", metadata=other)
    with pytest.raises(UnknownArchitecture, match="longrope"):
        locate(tmp_path / "other.gguf")


def test_rope_divisors_come_from_their_tensor(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    reader_of = tmp_path / "tiny.gguf"
    write_tiny_gguf(reader_of)
    _copy_with_tensor(reader_of, path, "rope_freqs.weight", np.array([1, 2, 4, 8] * 2, "f4"))
    assert locate(path).config.rope.frequency_divisors == (1, 2, 4, 8, 1, 2, 4, 8)
    load_path(path)


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    _copy_with_tensor(
        tmp_path / "tiny.gguf", tmp_path / "x.gguf", "blk.0.odd.weight", np.ones(4, "f4")
    )
    with pytest.raises(CheckpointError, match=r"blk\.0\.odd\.weight"):
        load_path(tmp_path / "x.gguf")


def _copy_with_tensor(source: Path, target: Path, name: str, array: np.ndarray) -> None:
    file = GGUFFile(source)
    writer = gguf.GGUFWriter(str(target), file.metadata["general.architecture"])
    for key, value in file.metadata.items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
    for tensor in file.tensors:
        writer.add_tensor(tensor, file.dequantize(tensor))
    writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_header_agrees_with_the_gguf_library(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, quant="Q4_1", metadata={"note": "text", "number": 0.5})
    file, reader = GGUFFile(path), gguf.GGUFReader(path)
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(file.dequantize(tensor.name), expected)
    for key, value in file.metadata.items():
        assert reader.fields[key].contents() == value, key
    assert "tokenizer.ggml.tokens" not in file.metadata


@pytest.mark.parametrize("keep", [0, 10, 60, 500, -5000])
def test_a_cut_off_file_is_an_error(keep: int, tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    path = tmp_path / "cut.gguf"
    path.write_bytes((tmp_path / "tiny.gguf").read_bytes()[:keep])
    with pytest.raises(CheckpointError):
        load_path(path)


def test_a_file_that_is_no_gguf_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"safe" * 100)
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        locate(path)


def test_names_of_unknown_form_are_refused() -> None:
    with pytest.raises(CheckpointError, match="cls"):
        gguf_source.hf_name("cls.weight", find_family("llama"))


@pytest.mark.slow
def test_the_first_layers_of_the_default_model_equal_transformers(
    default_model: str, tmp_path: Path
) -> None:
    """Without the tokenizer, which takes transformers longer to read than all tensors."""
    file = GGUFFile(Path(default_model))
    arch, num_layers = file.metadata["general.architecture"], 2
    path = tmp_path / "first.gguf"
    writer = gguf.GGUFWriter(str(path), arch)
    sizes = {**file.metadata, f"{arch}.block_count": num_layers}
    for key, value in sizes.items():
        if key.startswith(f"{arch}."):
            add_key(writer, key, value)
    for name, tensor in file.tensors.items():
        if not name.startswith("blk.") or int(name.split(".")[1]) < num_layers:
            kind = gguf.GGMLQuantizationType(tensor.type_id)
            data = file._bytes_of(tensor, kind).reshape(*tensor.shape[:-1], -1)
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _assert_equals_transformers(path)


@pytest.mark.long
def test_the_default_model_equals_transformers(default_model: str) -> None:
    _assert_equals_transformers(Path(default_model))


def _assert_equals_transformers(path: Path) -> None:
    ids_T = torch.randint(0, 49152, (40,), generator=torch.Generator().manual_seed(3))
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    with torch.inference_mode():
        expected_TV = reference(ids_T[None]).logits[0]
    got_TV = dense_logits(load_path(path), ids_T)
    torch.testing.assert_close(got_TV, expected_TV, rtol=0, atol=1e-4)


def test_a_type_that_cannot_be_dequantised_is_named(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    file = GGUFFile(tmp_path / "tiny.gguf")
    embedding = file.tensors["token_embd.weight"]
    file.tensors["token_embd.weight"] = dataclasses.replace(embedding, type_id=99)
    with pytest.raises(CheckpointError, match=r"token_embd\.weight has type 99"):
        file.dequantize("token_embd.weight")
    integers = dataclasses.replace(embedding, type_id=int(gguf.GGMLQuantizationType.I32))
    file.tensors["token_embd.weight"] = integers
    with pytest.raises(CheckpointError, match=r"token_embd\.weight has I32"):
        file.dequantize("token_embd.weight")
