"""A disk that is full: said with the path and the bytes, and nothing half written stays."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch.distributed.checkpoint import state_dict_saver

from engine.errors import DiskFull
from rollout.files.disk_space import append_bytes, free_bytes, replace_file, require_room, writing
from tests.helpers.file_limit import largest_file


def test_a_line_that_does_not_fit_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append_bytes(path, b"first\n")
    with largest_file(1000), pytest.raises(DiskFull) as caught:
        append_bytes(path, b"x" * 2000 + b"\n")
    assert path.read_bytes() == b"first\n"
    assert str(path) in str(caught.value) and "bytes are free" in str(caught.value)
    append_bytes(path, b"second\n")
    assert path.read_bytes() == b"first\nsecond\n"


def test_a_replaced_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    replace_file(path, b"old")
    with largest_file(1000), pytest.raises(DiskFull):
        replace_file(path, b"x" * 2000)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["summary.json"]
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"


def save_torch(path: Path) -> None:
    torch.save({"a": torch.zeros(100_000)}, path)


def save_safetensors(path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(100_000)}, path)


def save_distributed(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state_dict_saver.save({"a": torch.zeros(100_000)}, checkpoint_id=path, no_dist=True)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("save", [save_torch, save_safetensors, save_distributed])
def test_writers_of_other_languages(tmp_path: Path, save: Callable[[Path], None]) -> None:
    path = tmp_path / "big"
    with (
        largest_file(50_000),
        pytest.raises(DiskFull, match="400,000 bytes") as caught,
        writing(path, num_bytes=400_000, undo=lambda: remove(path)),
    ):
        save(path)
    assert str(path) in str(caught.value)
    assert not path.exists()


def test_other_errors_pass_and_still_undo(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(KeyError), writing(path, undo=path.unlink):
        path.write_text("half")
        raise KeyError("mistake")
    assert not path.exists()
    with pytest.raises(PermissionError), writing(path):
        raise PermissionError(errno.EACCES, "no")


def test_room_is_looked_for_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_room(tmp_path / "not" / "there", 1)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=3, f_frsize=1000))
    assert free_bytes(tmp_path / "not" / "there") == 3000
    require_room(tmp_path, 3000)
    with pytest.raises(DiskFull, match=r"about 1,234,567 bytes, and 3,000 are free"):
        require_room(tmp_path, 1_234_567)
