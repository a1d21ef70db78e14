"""Folders that a server fills from what a trainer published: whole versions and deltas."""

import asyncio
import fcntl
import io
import json
import os
import shutil
import sys
import threading
import types
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.errors import (
    CheckpointError,
    InvalidRequest,
    ModelNotFound,
    SlipstreamError,
    UnsupportedOption,
    UpdateTimeout,
)
from rollout.http.updates import pull_delta
from rollout.http.updates.pull import pull, require_pulled
from tests.helpers.http_app import run, serving, until

Tensors = dict[str, np.ndarray]
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


class FakeDecompressor:
    """Of a package that need not be installed; reads zlib."""

    def stream_reader(self, data: io.BytesIO) -> io.BytesIO:
        return io.BytesIO(zlib.decompress(data.read()))


@pytest.fixture(autouse=True)
def zstandard(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("zstandard")
    package.ZstdDecompressor = FakeDecompressor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zstandard", package)


def weights(seed: int) -> Tensors:
    draw = np.random.default_rng(seed)
    return {name: draw.normal(size=(5, 3)).astype(np.float32) for name in "abcd"}


def write_whole(folder: Path, tensors: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    for shard, names in zip(SHARDS, ("ab", "cd"), strict=True):
        save_file({name: tensors[name] for name in names}, folder / shard)
    return folder


def write_delta(
    source: Path, version: int, old: Tensors, new: Tensors, encoding: str = "xor", **changes: Any
) -> Path:
    """As slime does: changed tensors only, compressed, one file here."""
    folder = source / f"weight_v{version:06d}"
    folder.mkdir(parents=True)
    data: Tensors = {}
    sums: dict[str, str] = {}
    for name in new:
        one, two = (t[name].reshape(-1).view(np.uint8) for t in (old, new))
        if np.array_equal(one, two):
            continue
        mask = one != two
        where = np.flatnonzero(mask).astype("<u4")
        parts = [np.array([where.size], "<u4").view(np.uint8), where.view(np.uint8), two[mask]]
        diff = one ^ two if encoding == "xor" else np.concatenate(parts)
        data[name] = np.frombuffer(zlib.compress(diff.tobytes()), np.uint8)
        sums[name] = f"{zlib.adler32(two):08x}"
    save_file(data, folder / "model-00000-of-00001.safetensors", metadata=sums)
    meta = {
        "version": f"{version:06d}",
        "base_version": f"{version - 1:06d}",
        "delta_encoding": encoding,
        "compression_format": "zstd",
        "checksum_format": "adler32",
        **changes,
    }
    index = {
        "metadata": meta,
        "weight_map": dict.fromkeys(data, "model-00000-of-00001.safetensors"),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


class Run:
    """A base model, versions 1 to 3 as deltas, and the folder to fill."""

    def __init__(self, path: Path, encoding: str = "xor") -> None:
        self.base, self.source, self.local = path / "base", path / "source", path / "local"
        self.versions = [weights(seed) for seed in range(4)]
        self.versions[2]["a"] = self.versions[1]["a"]
        write_whole(self.base, self.versions[0])
        for version in (1, 2, 3):
            old, new = self.versions[version - 1 : version + 1]
            write_delta(self.source, version, old, new, encoding)

    def pull(self, version: int) -> None:
        pull(self.local, source=self.source, base=self.base, version=version)

    def check(self, version: int) -> None:
        require_pulled(self.local)
        found: Tensors = {}
        for path in self.local.glob("*.safetensors"):
            found |= load_file(path)
        assert found.keys() == self.versions[version].keys()
        for name, tensor in found.items():
            np.testing.assert_array_equal(tensor, self.versions[version][name])
        assert (self.local / "config.json").is_file()


@pytest.fixture(params=["xor", "overwrite"])
def published(tmp_path: Path, request: pytest.FixtureRequest) -> Run:
    return Run(tmp_path, request.param)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3], [0, 3], [2, 2, 3], [3, 1], [3, 0, 2]])
def test_any_version_from_any_other(published: Run, order: list[int]) -> None:
    for version in order:
        published.pull(version)
        published.check(version)


def test_a_whole_version_replaces_what_was_there(published: Run) -> None:
    published.pull(1)
    folder = published.source / "weight_v000004"
    folder.mkdir()
    save_file(weights(9), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    published.versions.append(weights(9))
    (published.local / "notes.txt").write_text("mine")
    published.pull(4)
    published.check(4)
    names = {path.name for path in published.local.iterdir() if path.is_file()}
    assert names == {"config.json", "model.safetensors", "notes.txt"}


@pytest.mark.parametrize("dies_at", range(1, 6))
def test_a_pull_that_dies_leaves_a_mark_and_the_next_one_repairs_it(
    published: Run, dies_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.pull(1)
    left = [dies_at]

    def replace(path: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(28, "No space left on device")
        return real(path, target)

    real = Path.replace
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(CheckpointError, match=r"local.*No space left"):
            published.pull(3)
    with pytest.raises(CheckpointError, match="between two versions"):
        require_pulled(published.local)
    for version in (1, 3) if dies_at % 2 else (3,):
        published.pull(version)
        published.check(version)


@pytest.mark.parametrize("how", ["replaced", "rewritten"])
def test_a_whole_version_that_is_written_anew_while_it_is_copied(
    published: Run, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The local folder would have a file of each under one number."""
    folder = write_whole(published.source / "weight_v000004", weights(4))
    newer = write_whole(published.source / "newer", weights(5))
    published.versions += [weights(5)]

    real, left = Path.replace, [1]

    def replace(path: Path, target: Path) -> Path:
        if not left:
            return real(path, target)
        left.clear()
        if how == "replaced":
            folder.rename(folder.with_name("old"))
            newer.rename(folder)
        else:
            for file in sorted(newer.iterdir()):
                shutil.copyfile(file, folder / file.name)
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(CheckpointError, match="written anew"):
            pull(published.local, source=published.source, base=published.base, version=4)
    with pytest.raises(CheckpointError, match="between two versions"):
        require_pulled(published.local)
    published.pull(4)
    published.check(4)


def test_local_weights_that_were_changed_are_copied_anew(published: Run) -> None:
    published.pull(1)
    path = published.local / SHARDS[0]
    data = bytearray(path.read_bytes())
    data[-3] ^= 0xFF
    path.write_bytes(data)
    published.pull(3)
    published.check(3)


def break_index(run: Run) -> None:
    (run.source / "weight_v000002" / "model.safetensors.index.json").write_text('{"metadata": 3}')


def remove_file(run: Run) -> None:
    (run.source / "weight_v000002" / "model-00000-of-00001.safetensors").unlink()


def cut_file(run: Run) -> None:
    path = run.source / "weight_v000002" / "model-00000-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def remove_version(run: Run) -> None:
    shutil.rmtree(run.source / "weight_v000002")


def wrong_sum(run: Run) -> None:
    path = run.source / "weight_v000002" / "model-00000-of-00001.safetensors"
    save_file(load_file(path), path, metadata=dict.fromkeys("abcd", "00000000"))


def rewritten(**changes: Any) -> Any:
    def change(run: Run) -> None:
        remove_version(run)
        write_delta(run.source, 2, run.versions[1], run.versions[2], **changes)

    return change


def no_sums(run: Run) -> None:
    path = run.source / "weight_v000002" / "model-00000-of-00001.safetensors"
    save_file(load_file(path), path)


def outside(run: Run) -> None:
    path = run.source / "weight_v000002" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["b"] = "../weight_v000001/model-00000-of-00001.safetensors"
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "change,kind,message",
    [
        (break_index, CheckpointError, "index.json cannot be read"),
        (remove_file, ModelNotFound, "is not there"),
        (cut_file, CheckpointError, "cut off"),
        (remove_version, ModelNotFound, "weight_v000002 is not there"),
        (wrong_sum, CheckpointError, "has checksum"),
        (no_sums, CheckpointError, "no checksum"),
        (outside, CheckpointError, "outside its folder"),
        (rewritten(compression_format="lz4"), UnsupportedOption, "lz4"),
        (rewritten(delta_encoding="sparse"), UnsupportedOption, "sparse"),
        (rewritten(checksum_format="crc"), UnsupportedOption, "crc"),
        (rewritten(base_version="000000"), CheckpointError, "leads from version"),
    ],
)
def test_a_broken_version_is_refused_by_name_and_the_folder_is_marked(
    tmp_path: Path, change: Any, kind: type[SlipstreamError], message: str
) -> None:
    found = Run(tmp_path)
    change(found)
    found.pull(1)
    with pytest.raises(kind, match=message):
        found.pull(3)
    found.pull(1)
    found.check(1)


@pytest.mark.parametrize(
    ("package", "change"), [("zstandard", {}), ("xxhash", {"checksum_format": "xxh3-128"})]
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, change: dict[str, str]
) -> None:
    found = Run(tmp_path)
    rewritten(**change)(found)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UnsupportedOption, match=rf"{package}.*extra 'delta'"):
        found.pull(2)


def test_a_delta_that_would_fill_the_memory_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Run(tmp_path)
    read: list[int] = []

    class Endless:
        def read(self, size: int) -> bytes:
            read.append(size)
            return bytes(size)

    monkeypatch.setattr(FakeDecompressor, "stream_reader", lambda self, data: Endless())
    with pytest.raises(CheckpointError, match="more than 60 bytes"):
        found.pull(1)
    assert len(read) <= 2


def test_which_folders_may_be_written_over(tmp_path: Path) -> None:
    found = Run(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    for local in (found.base, found.source, tmp_path / "home", found.source / "weight_v000001"):
        before = sorted(path.name for path in local.iterdir())
        with pytest.raises(InvalidRequest) as caught:
            pull(local, source=found.source, base=found.base, version=1)
        assert caught.value.field == "local_checkpoint_dir"
        assert sorted(path.name for path in local.iterdir()) == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(SlipstreamError):
        pull(tmp_path / "file", source=found.source, base=found.base, version=1)


def test_version_0_of_a_model_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFound, match="cannot be version 0"):
        pull(tmp_path / "local", source=None, base=tmp_path / "model.gguf", version=0)
    with pytest.raises(InvalidRequest, match="source_dir"):
        pull(tmp_path / "local", source=None, base=tmp_path / "model.gguf", version=1)


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\x02" + bytes(7) + b"[]", bytes(8)])
def test_a_file_that_is_no_safetensors_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        pull_delta.read_header(tmp_path / "model.safetensors")


def test_a_source_that_is_not_there_leaves_no_folder(tmp_path: Path) -> None:
    found = Run(tmp_path)
    (found.source / "weight_v000005").mkdir()
    local = tmp_path / "new" / "local"
    for version in (5, 6):
        with pytest.raises(ModelNotFound):
            pull(local, source=found.source, base=found.base, version=version)
    with pytest.raises(ModelNotFound):
        pull(local, source=found.source, base=tmp_path / "nowhere", version=0)
    assert not (tmp_path / "new").exists()


def test_the_served_model_is_written_by_no_way(tmp_path: Path) -> None:
    base = write_whole(tmp_path / "models" / "m", weights(0))
    write_whole(tmp_path / "models", weights(1))
    blobs = write_whole(tmp_path / "blobs", weights(2))
    (base / "linked.safetensors").symlink_to(blobs / SHARDS[0])
    (tmp_path / "link").symlink_to(base)
    source = tmp_path / "source"
    write_whole(source / "weight_v000001", weights(3))
    for local in (base, base / "inside", tmp_path / "models", tmp_path / "link", blobs):
        with pytest.raises(InvalidRequest, match="started with") as refused:
            pull(local, source=source, base=base, version=1)
        assert refused.value.field == "local_checkpoint_dir"
    file = base / "config.json"
    with pytest.raises(InvalidRequest, match="started with"):
        pull(base, source=source, base=file, version=1)
    assert not (base / ".weight_sync").exists()


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("/dev/zero")


INDEX = pull_delta.INDEX
PACKED = "model-00000-of-00001.safetensors"
TRAPS = [f"source/weight_v000001/{INDEX}", f"source/weight_v000001/{PACKED}"]
TRAPS += ["local/.weight_sync/lock", "local/.weight_sync/state.json", f"local/{SHARDS[1]}"]
TRAPS += ["local/.weight_sync/unfinished"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("trap", [pipe, endless])
@pytest.mark.parametrize("at", TRAPS)
def test_what_is_no_regular_file_is_refused_or_replaced_at_once(
    tmp_path: Path, at: str, trap: Callable[[Path], None]
) -> None:
    found = Run(tmp_path)
    found.pull(0)
    trap(tmp_path / at)
    try:
        found.pull(1)
    except SlipstreamError as error:
        assert Path(at).name in f"{error} {error.field}"
    else:
        assert_whole(found.local)


def assert_whole(folder: Path) -> None:
    for path in folder.rglob("*"):
        assert path.is_dir() or (path.is_file() and not path.is_symlink()), path


def test_written_files_follow_no_link(tmp_path: Path) -> None:
    found = Run(tmp_path)
    found.pull(0)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("beside", "state.json.tmp"):
        (found.local / ".weight_sync" / name).symlink_to(victim)
    found.pull(1)
    assert victim.read_text() == "precious"
    found.check(1)


def test_a_pull_waits_for_another_one_into_its_folder_alone(tmp_path: Path) -> None:
    found = Run(tmp_path)
    found.pull(0)
    with (found.local / ".weight_sync" / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UpdateTimeout, match="did not end"):
            pull(found.local, source=found.source, base=found.base, version=1, timeout_s=0.05)
        pull(tmp_path / "other", source=found.source, base=found.base, version=1)
    found.pull(1)
    found.check(1)


def test_a_pull_that_hangs_holds_neither_others_nor_the_process(tmp_path: Path) -> None:
    found = Run(tmp_path)
    write_whole(found.source / "weight_v000007", weights(7))
    found.pull(0)
    body = {"local_checkpoint_dir": str(found.local), "source_dir": str(found.source)}
    other = {**body, "local_checkpoint_dir": str(tmp_path / "other")}

    async def test() -> None:
        async with serving() as server:
            first = asyncio.ensure_future(
                server.post("/pull_weights", {**body, "target_version": 7})
            )
            await until(lambda: any(thread.name == "files" for thread in threading.enumerate()))
            reply = await server.post("/pull_weights", {**other, "target_version": 7})
            assert reply.json()["success"], reply.text
            assert not first.done()
            hanging = [t for t in threading.enumerate() if t.name == "files"]
            assert hanging and all(thread.daemon for thread in hanging)
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert (await first).json()["success"]

    with (found.local / ".weight_sync" / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run(test)


def test_the_route_fills_the_folder_and_loads_nothing(tmp_path: Path) -> None:
    found = Run(tmp_path)

    async def test() -> None:
        async with serving() as server:
            folder = write_whole(found.source / "weight_v000007", weights(7))
            body = {"local_checkpoint_dir": str(found.local), "source_dir": str(found.source)}
            reply = await server.post("/pull_weights", {**body, "target_version": 7})
            assert reply.json()["success"], reply.text
            assert (await server.get("/weight_version")).json() == {"weight_version": "0"}
            assert server.commands() == []
            assert load_file(found.local / SHARDS[0]).keys() == {"a", "b"}
            reply = await server.post("/pull_weights", {**body, "target_version": 8})
            assert (reply.status_code, reply.json()["error"]["type"]) == (400, "ModelNotFound")
            (found.local / ".weight_sync" / "unfinished").touch()
            for path, field in (
                ("/update_weights_from_disk", "model_path"),
                ("/update_weights", "weight_dir"),
            ):
                reply = await server.post(path, {field: str(found.local)})
                assert "between two versions" in reply.json()["error"]["message"]
            assert server.commands() == []
            assert folder.is_dir()

    run(test)
