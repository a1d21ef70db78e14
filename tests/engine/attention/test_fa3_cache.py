"""Which compiled modules of FlashInfer are found; names as flashinfer-python 0.6.14 makes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.attention import fa3_cache
from engine.attention.fa3_cache import cache_folders, holds_fa3_prefill, prebuilt_folders

HEADS = "head_dim_qk_128_head_dim_vo_128"
NAME = (
    "batch_prefill_with_kv_cache_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32_"
    f"{HEADS}_posenc_0_use_swa_False_use_logits_cap_False_f16qk_False_sm90"
)


def compiled(folder: Path, name: str = NAME) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / f"{name}.so").touch()
    return folder


def test_the_module_of_this_dtype_and_head_size_is_found(tmp_path: Path) -> None:
    folders = [tmp_path / "absent", compiled(tmp_path / "ops")]
    assert holds_fa3_prefill(folders, torch.bfloat16, 128)
    assert not holds_fa3_prefill(folders, torch.float16, 128)
    assert not holds_fa3_prefill(folders, torch.bfloat16, 64)
    assert not holds_fa3_prefill([], torch.bfloat16, 128)


@pytest.mark.parametrize(
    "name",
    [
        NAME.removesuffix("_sm90"),
        NAME.replace("swa_False", "swa_True"),
        NAME.replace("batch_prefill_with", "batch_decode_with"),
        NAME.replace("dtype_kv_bf16", "dtype_kv_e4m3"),
    ],
)
def test_another_module_is_none(tmp_path: Path, name: str) -> None:
    assert not holds_fa3_prefill([compiled(tmp_path, name)], torch.bfloat16, 128)


def test_a_module_whose_compilation_never_ended_is_none(tmp_path: Path) -> None:
    compiled(tmp_path)
    (tmp_path / NAME / f"{NAME}.so").rename(tmp_path / NAME / "batch_prefill.cuda.o")
    assert not holds_fa3_prefill([tmp_path], torch.bfloat16, 128)


def test_the_cache_lies_at_home_or_where_the_environment_says(tmp_path: Path) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    ops = compiled(home / ".cache/flashinfer/0.6.14/90a/cached_ops")
    elsewhere = compiled(other / ".cache/flashinfer/0.6.14/80_90a/cached_ops")
    assert cache_folders({}, home, "0.6.14") == [ops]
    assert cache_folders({}, home, "*") == [ops]
    assert cache_folders({}, home, "0.7.0") == []
    assert cache_folders({"FLASHINFER_WORKSPACE_BASE": str(other)}, home, "0.6.14") == [elsewhere]


def test_packages_bring_modules_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flashinfer_jit_cache").mkdir()
    (tmp_path / "flashinfer_jit_cache" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    folder = compiled(tmp_path / "flashinfer_jit_cache" / "jit_cache")
    assert folder in prebuilt_folders()


def test_a_release_without_metadata_is_any(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise fa3_cache.PackageNotFoundError(name)

    monkeypatch.setattr(fa3_cache, "version", absent)
    assert fa3_cache.installed_release() == "*"
