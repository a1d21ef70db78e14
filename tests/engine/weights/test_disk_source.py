"""Folders of weights into the open update: whole ones and deltas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.errors import (
    CheckpointError,
    ChecksumMismatch,
    ManifestMismatch,
    ModelNotFound,
    UpdateOrder,
)
from engine.protocol import BeginUpdate, CommitUpdate, LoadFromDisk
from engine.weights.checksum import checksum
from engine.weights.sources.disk import DELTA_FILE
from tests.helpers.weight_engines import assert_holds, contents, fresh, make_rank, specs
from trainer_bridge.transports.disk import Delta, write

NORM = "model.norm.weight"


def delta(tensors: dict[str, torch.Tensor], base: int = 3, version: int = 4) -> Delta:
    listed = specs(tensors)
    return Delta(
        base,
        version,
        [type(s)(s.name, s.dtype, s.shape, checksum(tensors[s.name])) for s in listed],
    )


def load(rank, path: Path, begin: BeginUpdate) -> None:
    rank.handle(begin)
    rank.handle(LoadFromDisk(path=str(path)))
    rank.handle(CommitUpdate(version=begin.version))


@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
def test_a_folder_is_placed_at_the_commit(tmp_path: Path, mode: str) -> None:
    model, rank = make_rank()
    new = fresh(model)
    path = write(tmp_path / "v4", new.items())
    load(rank, path, BeginUpdate(version=4, manifest=specs(new), mode=mode))
    assert_holds(model, new)


def test_a_delta_changes_what_it_holds(tmp_path: Path) -> None:
    model, rank = make_rank()
    before = contents(model)
    changed = {NORM: torch.full((16,), 2.5)}
    said = delta(changed)
    path = write(tmp_path / "v4", changed.items(), delta=said)
    load(rank, path, BeginUpdate(version=4, manifest=said.tensors, partial=True))
    assert_holds(model, {**before, **changed})
    assert rank.session.version == 4


def test_a_delta_of_a_sharded_engine_is_sliced(tmp_path: Path) -> None:
    model, rank = make_rank(1, 2)
    changed = {"model.embed_tokens.weight": torch.randn(33, 16)}
    path = write(tmp_path / "v4", changed.items(), delta=delta(changed))
    load(rank, path, BeginUpdate(version=4, partial=True))
    full = {**fresh(make_rank()[0], seed=0), **changed}
    assert_holds(model, full)


@pytest.mark.parametrize(
    "base,version,message",
    [(2, 4, "changes version 2, and 3 serves"), (3, 5, "leads to version 5")],
)
def test_a_delta_against_another_version(tmp_path, base: int, version: int, message: str) -> None:
    model, rank = make_rank()
    before, changed = contents(model), {NORM: torch.zeros(16)}
    path = write(tmp_path / "v", changed.items(), delta=delta(changed, base, version))
    with pytest.raises(UpdateOrder, match=message):
        load(rank, path, BeginUpdate(version=4, partial=True))
    assert_holds(model, before)


def test_a_delta_whose_files_are_not_what_it_says(tmp_path: Path) -> None:
    _, rank = make_rank()
    changed = {NORM: torch.zeros(16)}
    extra = {**changed, "model.embed_tokens.weight": torch.zeros(33, 16)}
    for there, listed in ((changed, extra), (extra, changed)):
        path = write(tmp_path / "v", there.items(), delta=delta(listed))
        rank.handle(BeginUpdate(version=4, partial=True))
        with pytest.raises(ManifestMismatch, match="embed_tokens"):
            rank.handle(LoadFromDisk(path=str(path)))


def test_a_delta_with_changed_bits(tmp_path: Path) -> None:
    _, rank = make_rank()
    said = delta({NORM: torch.zeros(16)})
    path = write(tmp_path / "v", {NORM: torch.full((16,), 1e-30)}.items(), delta=said)
    with pytest.raises(ChecksumMismatch, match="norm"):
        load(rank, path, BeginUpdate(version=4, manifest=said.tensors, partial=True))


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    model, rank = make_rank()
    rank.handle(BeginUpdate(version=4))
    with pytest.raises(ModelNotFound, match="nowhere"):
        rank.handle(LoadFromDisk(path=str(tmp_path / "nowhere")))
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(CheckpointError, match="cut"):
        rank.handle(LoadFromDisk(path=str(tmp_path / "cut.safetensors")))
    path = write(tmp_path / "v", fresh(model).items())
    (path / DELTA_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="delta"):
        rank.handle(LoadFromDisk(path=str(path)))
