"""Folders that are written anew while they are read: never a mixture of both."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.errors import CheckpointError
from engine.protocol import AbortUpdate, BeginUpdate, CommitUpdate, LoadFromDisk
from tests.helpers.weight_engines import Tensors, assert_holds, contents, fresh, make_rank
from trainer_bridge.transports.disk import write

SHARD_BYTES = 4000


def replaced(folder: Path, newer: Path) -> None:
    """A folder of that name again, as trainers do that rename whole ones."""
    folder.rename(folder.with_name("old"))
    newer.rename(folder)


def rewritten(folder: Path, newer: Path) -> None:
    """Every file, one after the other, as trainers do that save into the same folder."""
    for file in sorted(newer.iterdir()):
        shutil.copyfile(file, folder / file.name)


def renamed_over(folder: Path, newer: Path) -> None:
    """Every file by a rename, with the times of the old one, as a copy that keeps them."""
    for file in sorted(newer.iterdir()):
        was = (folder / file.name).stat()
        os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
        file.rename(folder / file.name)


@pytest.mark.parametrize("mode", ["shadow", "undo"])
@pytest.mark.parametrize("at", [1, 5, 12])
@pytest.mark.parametrize("change", [replaced, rewritten, renamed_over])
def test_a_folder_that_is_written_anew_while_it_is_read(
    tmp_path: Path, change: Callable[[Path, Path], None], at: int, mode: str
) -> None:
    model, rank = make_rank()
    before, first, second = contents(model), fresh(model, 1), fresh(model, 2)
    folder = _shards(tmp_path / "w", first)
    newer = _shards(tmp_path / "newer", second)
    asked = 0

    def look() -> None:
        nonlocal asked
        asked += 1
        if asked == at:
            change(folder, newer)

    rank.handle(BeginUpdate(version=10, mode=mode))
    with pytest.raises(CheckpointError, match=r"safetensors .*written anew"):
        rank.handle(LoadFromDisk(path=str(folder)), look)
    rank.handle(AbortUpdate(version=10))
    assert all(torch.equal(before[name], live) for name, live in contents(model).items())
    rank.session.require_servable()

    rank.handle(BeginUpdate(version=11, mode=mode))
    rank.handle(LoadFromDisk(path=str(folder)))
    rank.handle(CommitUpdate(version=11))
    assert_holds(model, second)


def _shards(folder: Path, tensors: Tensors) -> Path:
    write(folder, tensors.items(), shard_bytes=SHARD_BYTES)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder
