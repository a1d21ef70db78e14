"""Folders of weights into the open update: whole ones and deltas."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import (
    CheckpointError,
    ChecksumMismatch,
    ManifestMismatch,
    ModelNotFound,
    UpdateOrder,
    WeightUpdateError,
)
from engine.protocol import (
    DELTA_FILE,
    AbortUpdate,
    BeginUpdate,
    CommitUpdate,
    FolderDelta,
    LoadFromDisk,
)
from engine.weights.checksum import checksum
from engine.weights.sources.safetensors import INDEX_NAME
from tests.helpers.children import ROOT, child_environment
from tests.helpers.weight_engines import assert_holds, contents, fresh, make_rank, specs
from trainer_bridge.transports.disk import write

NORM = "model.norm.weight"


def delta(tensors: dict[str, torch.Tensor], base: int = 3, version: int = 4) -> FolderDelta:
    listed = specs(tensors)
    return FolderDelta(
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


MODES = ["shadow", "undo", "in_place"]


def sharded(folder: Path, tensors: dict[str, torch.Tensor], count: int = 3) -> Path:
    """An indexed set of shards."""
    folder.mkdir()
    weight_map = {}
    for shard in range(count):
        name = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        mine = {n: t for i, (n, t) in enumerate(tensors.items()) if i % count == shard}
        save_file(mine, folder / name)
        weight_map.update(dict.fromkeys(mine, name))
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("how", ["removed", "cut", "overwritten"])
@pytest.mark.parametrize("mode", MODES)
def test_files_may_go_once_the_command_has_answered(tmp_path: Path, mode: str, how: str) -> None:
    model, rank = make_rank()
    new = fresh(model)
    path = write(tmp_path / "v4", new.items()) / "model.safetensors"
    rank.handle(BeginUpdate(version=4, mode=mode))
    rank.handle(LoadFromDisk(path=str(path.parent)))
    if how == "removed":
        path.unlink()
    elif how == "cut":
        os.truncate(path, 0)
    else:
        with path.open("r+b") as file:
            file.write(b"\xff" * path.stat().st_size)
    rank.handle(CommitUpdate(version=4))
    assert_holds(model, new)


def test_a_file_that_is_cut_while_it_is_read_is_an_error_and_no_signal(tmp_path: Path) -> None:
    """In a process of its own: touching a mapping of such a file would end it."""
    save_file({"a": torch.ones(1 << 16), "b": torch.ones(1 << 16)}, tmp_path / "model.safetensors")
    code = (
        "import os, sys, pathlib\n"
        "from engine.errors import CheckpointError\n"
        "from engine.weights.sources import safetensors\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "source = safetensors.tensors(path)\n"
        "first = next(source)[1]\n"
        "os.truncate(path / 'model.safetensors', 5000)\n"
        "assert float(first.sum()) == 1 << 16\n"
        "try:\n"
        "    next(source)\n"
        "except CheckpointError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=child_environment(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "model.safetensors cannot be read: b is cut off" in done.stdout


@pytest.mark.parametrize("mode", MODES)
def test_a_folder_is_whole_unless_it_says_otherwise(tmp_path: Path, mode: str) -> None:
    model, rank = make_rank()
    before, new = contents(model), fresh(model)
    part = dict(list(new.items())[:5])
    path = str(write(tmp_path / "v4", part.items()))
    rank.handle(BeginUpdate(version=4, mode=mode, partial=True))
    with pytest.raises(ManifestMismatch, match=r"v4 lacks .* and \d+ more"):
        rank.handle(LoadFromDisk(path=path))
    assert_holds(model, before)
    rank.session.require_servable()
    rank.handle(LoadFromDisk(path=path, partial=True))
    rank.handle(CommitUpdate(version=4))
    assert_holds(model, {**before, **part})


def test_an_index_is_the_manifest(tmp_path: Path) -> None:
    model, rank = make_rank()
    before, new = contents(model), fresh(model)
    path = sharded(tmp_path / "v4", new)
    load(rank, path, BeginUpdate(version=4))
    assert_holds(model, new)
    first = path / "model-00001-of-00003.safetensors"
    whole = first.read_bytes()
    rank.handle(BeginUpdate(version=5, partial=True))
    for partial in (True, False):
        for spoil, message in (
            (lambda: first.write_bytes(whole[:-8]), "cut off or still being written"),
            (lambda: save_file({NORM: torch.ones(16)}, first), "lacks .*, which .* says it holds"),
            (first.unlink, "names model-00001-of-00003.safetensors, which is missing"),
        ):
            spoil()
            with pytest.raises(CheckpointError, match=f"(?s)model-00001.*{message}|{message}"):
                rank.handle(LoadFromDisk(path=str(path), partial=partial))
    assert_holds(model, new)
    del before


@pytest.mark.parametrize(
    "stray",
    [
        "model.safetensors.tmp",
        "model-00003-of-00003.safetensors.incomplete",
        ".model.safetensors.k3Fq9Z",
        "delta.json.tmp",
        "model.safetensors.tmp.4711",
        "download.part",
    ],
)
def test_a_folder_that_is_still_being_written_is_refused(tmp_path: Path, stray: str) -> None:
    model, rank = make_rank()
    before, new = contents(model), fresh(model)
    path = write(tmp_path / "v4", new.items())
    (path / stray).write_bytes(b"")
    rank.handle(BeginUpdate(version=4))
    with pytest.raises(CheckpointError, match=stray):
        rank.handle(LoadFromDisk(path=str(path)))
    assert_holds(model, before)
    (path / stray).unlink()
    rank.handle(LoadFromDisk(path=str(path)))
    rank.handle(CommitUpdate(version=4))
    assert_holds(model, new)


def test_shards_without_an_index_say_how_many_they_are(tmp_path: Path) -> None:
    model, rank = make_rank()
    new = fresh(model)
    path = sharded(tmp_path / "v4", new)
    (path / INDEX_NAME).unlink()
    (path / "model-00002-of-00003.safetensors").rename(tmp_path / "aside")
    rank.handle(BeginUpdate(version=4))
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing"):
        rank.handle(LoadFromDisk(path=str(path)))
    (tmp_path / "aside").rename(path / "model-00002-of-00003.safetensors")
    rank.handle(LoadFromDisk(path=str(path)))
    rank.handle(CommitUpdate(version=4))
    assert_holds(model, new)


def strange_paths(folder: Path) -> list[str]:
    """Paths of every kind that is no folder of weights."""
    os.mkfifo(folder / "pipe")
    (folder / "pipes").mkdir()
    os.mkfifo(folder / "pipes" / "model.safetensors")
    (folder / "index").mkdir()
    os.mkfifo(folder / "index" / INDEX_NAME)
    (folder / "delta").mkdir()
    os.mkfifo(folder / "delta" / DELTA_FILE)
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "dangling").mkdir()
    (folder / "dangling" / "model.safetensors").symlink_to("/nowhere/at/all")
    (folder / "deep").mkdir()
    (folder / "deep" / INDEX_NAME).write_text("[" * 100_000)
    (folder / "out").mkdir()
    (folder / "out" / INDEX_NAME).write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    (folder / "latin").mkdir()
    (folder / "latin" / INDEX_NAME).write_bytes(b'{"weight_map": {"\xe9": "a"}}')
    (folder / "empty").mkdir()
    (folder / "file").write_bytes(b"")
    inside = ["pipe", "pipes", "index", "delta", "loop", "dangling", "deep", "out", "latin"]
    return [
        *(str(folder / name) for name in [*inside, "empty", "file", "file/beyond"]),
        "/proc/self/mem",
        "/dev/zero",
        "/dev/null",
        "x" * 5000,
        "/" + "y/" * 3000,
        "nul\0nul",
        "",
        "\udcff",
    ]


def test_no_path_ends_or_hangs_an_engine(tmp_path: Path) -> None:
    model, rank = make_rank()
    before = contents(model)
    rank.handle(BeginUpdate(version=4))
    for path in strange_paths(tmp_path):
        with pytest.raises((CheckpointError, ModelNotFound)) as refusal:
            rank.handle(LoadFromDisk(path=path))
        assert refusal.value.field == "path"
        assert len(refusal.value.message) < 1000
    assert_holds(model, before)
    rank.session.require_servable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    _, rank = make_rank()
    rank.handle(BeginUpdate(version=4))
    folder = tmp_path / "secret"
    folder.mkdir(mode=0)
    with pytest.raises(CheckpointError, match="secret"):
        rank.handle(LoadFromDisk(path=str(folder)))


def test_a_tensor_of_another_model_is_named_with_its_file(tmp_path: Path) -> None:
    model, rank = make_rank()
    new = {**fresh(model), "layers.0.attention.wq.weight": torch.ones(2)}
    path = write(tmp_path / "v4", new.items())
    rank.handle(BeginUpdate(version=4))
    with pytest.raises(ManifestMismatch, match=r"attention\.wq.*v4/model\.safetensors"):
        rank.handle(LoadFromDisk(path=str(path)))


def test_a_load_that_is_cancelled_ends_at_the_next_tensor(tmp_path: Path) -> None:
    model, rank = make_rank()
    old, looks = contents(model), 0
    save_file(fresh(model), tmp_path / "model.safetensors")

    def look() -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            raise WeightUpdateError("the update was aborted", field="cancelled")

    rank.handle(BeginUpdate(version=4, mode="undo"))
    with pytest.raises(WeightUpdateError, match="aborted"):
        rank.handle(LoadFromDisk(path=str(tmp_path)), look)
    assert looks == 3
    rank.handle(AbortUpdate(version=4))
    for name, tensor in contents(model).items():
        assert torch.equal(tensor, old[name]), name
    load(rank, tmp_path, BeginUpdate(version=4))
    rank.close()


@pytest.mark.parametrize("mode", ["shadow", "undo"])
@pytest.mark.parametrize("lie", ["bits", "dtype", "shape"])
def test_what_a_delta_lists_holds_for_callers_that_announce_nothing(
    tmp_path: Path, lie: str, mode: str
) -> None:
    model, rank = make_rank()
    before = contents(model)
    there = {NORM: torch.full((16,), 0.5), "model.layers.0.input_layernorm.weight": torch.ones(16)}
    listed = dict(there)
    listed[NORM] = {
        "bits": torch.full((16,), 0.25),
        "dtype": there[NORM].double(),
        "shape": there[NORM].view(4, 4),
    }[lie]
    path = write(tmp_path / "v4", there.items(), delta=delta(listed))
    begin = BeginUpdate(version=4, partial=True, mode=mode)
    with pytest.raises(ChecksumMismatch if lie == "bits" else ManifestMismatch, match=NORM):
        load(rank, path, begin)
    rank.handle(AbortUpdate(version=4))
    assert_holds(model, before)
    rank.session.require_servable()
    load(rank, write(tmp_path / "v4", there.items(), delta=delta(there)), begin)
    assert_holds(model, before | there)
