"""Finding a model on disk, and saying what is wrong when it is not one."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest

from engine.errors import CheckpointError, ModelNotFound, UnknownArchitecture
from engine.models.locate import locate
from tests.helpers.tiny_models import write_tiny, write_tiny_gguf


def test_a_hugging_face_folder_and_its_config(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama")
    for path in (tmp_path, tmp_path / "config.json", str(tmp_path)):
        files = locate(path)
        assert (files.kind, files.path) == ("safetensors", tmp_path)
        assert files.config.eos_token_ids == (2,)
        assert files.source["hidden_size"] == 64


def test_generation_config_is_read(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert locate(tmp_path).config.eos_token_ids == (7, 8)


def test_a_gguf_file_and_a_folder_with_one(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_tiny_gguf(file)
    for path in (file, tmp_path):
        assert (locate(path).kind, locate(path).path) == ("gguf", file)


def test_random_weights_need_only_a_config(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama")
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match="load_format 'random'"):
        locate(tmp_path)
    assert locate(tmp_path, "random").kind == "random"
    assert locate(tmp_path / "config.json", "random").kind == "random"


def test_gguf_metadata_can_stand_for_a_config(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    assert locate(tmp_path, "random").kind == "random"


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="absent"):
        locate(tmp_path / "absent")
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        locate(tmp_path)


def test_the_wrong_format_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "hf", "llama")
    write_tiny_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(CheckpointError, match="'gguf'"):
        locate(tmp_path / "hf", "gguf")
    with pytest.raises(CheckpointError, match="'safetensors'"):
        locate(tmp_path / "tiny.gguf", "safetensors")


def test_several_gguf_files_need_a_choice(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"a\.gguf, b\.gguf"):
        locate(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "\N{SNOWMAN}"])
def test_a_broken_config_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        locate(tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match=r"weights\.bin"):
        locate(tmp_path / "weights.bin")


def test_an_unknown_gguf_architecture_lists_the_known(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "rwkv")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnknownArchitecture, match=r"'rwkv'.*llama, qwen2, qwen3"):
        locate(tmp_path / "x.gguf")
