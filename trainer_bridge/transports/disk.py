"""Weights as a folder of safetensors that both sides can see: all of them, or what changed.

A folder is written under another name and renamed when whole, so an engine never reads half
of it. A delta folder names the version it changes, and the engine takes it on no other.
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from msgspec.structs import replace
from safetensors import SafetensorError
from safetensors.torch import save_file

from engine.errors import WeightUpdateError
from engine.protocol import (
    DELTA_FILE,
    AbortUpdate,
    BeginUpdate,
    CommitUpdate,
    FolderDelta,
    LoadFromDisk,
    UpdateReport,
)
from trainer_bridge.adapters.base import WeightSource
from trainer_bridge.checksum import with_checksums
from trainer_bridge.delta_base import DeltaBase
from trainer_bridge.fleet import Member, draw_owner, on_each, owned
from trainer_bridge.transports.base import Carrier
from trainer_bridge.transports.scratch_folder import ScratchFolder
from trainer_bridge.update_target import UpdateTarget, try_send

logger = logging.getLogger(__name__)

SHARD_BYTES = 4 << 30
"""Most bytes of one file, unless one tensor is larger."""


class DiskCarrier(Carrier):
    """Writes a folder of the version into `folder` and has the engines load it.

    delta: from the second update on, write only the tensors whose checksum changed since the
    last one this carrier published, as long as every engine holds that still (`DeltaBase`);
    else all, and the log says why. keep: leave the folders there, as `weight_v<version>`. Else
    they are in a folder of this carrier alone, so that trainers which share `folder` neither
    replace nor remove each other's, and those that a killed one leaves go with the next.
    """

    def __init__(
        self,
        targets: Sequence[UpdateTarget],
        folder: Path,
        *,
        delta: bool = False,
        keep: bool = False,
    ) -> None:
        self.targets = targets
        self._folder = folder
        self._keep = keep
        self._scratch: ScratchFolder | None = None
        self._base = DeltaBase() if delta else None
        self._since: int | None = None

    def announce(
        self, begin: BeginUpdate, source: WeightSource, members: Sequence[Member]
    ) -> BeginUpdate:
        """The update that will be announced: of the changed tensors only, for a delta that
        every engine can take."""
        self._since = None
        if self._base is None:
            return begin
        specs = with_checksums(begin.manifest, source.tensors())
        if self._base.version is None:
            return replace(begin, manifest=specs)
        why = self._base.missing_from(members)
        if why:
            logger.warning("version %d is sent whole: %s", begin.version, why)
            return replace(begin, manifest=specs)
        self._since = self._base.version
        # An update brings something: one tensor as it was, where nothing changed.
        changed = self._base.changed(specs) or specs[:1]
        return replace(begin, manifest=changed, partial=True)

    def committed(self, begin: BeginUpdate, members: Sequence[Member]) -> None:
        """See `Carrier`."""
        if self._base is not None:
            self._base.committed(begin, members)

    def carry(self, begin: BeginUpdate, source: WeightSource, members: Sequence[Member]) -> None:
        """See `Carrier`."""
        wanted = {spec.name for spec in begin.manifest}
        chosen = ((name, tensor) for name, tensor in source.tensors() if name in wanted)
        if self._scratch is None and not self._keep:
            with _writing(self._folder):
                self._scratch = ScratchFolder(self._folder)
        path = self._path(begin)
        delta = None
        if self._since is not None:
            delta = FolderDelta(self._since, begin.version, begin.manifest)
        write(path, chosen, delta=delta)
        load = LoadFromDisk(path=str(path), owner=begin.owner)
        on_each(members, lambda member: member.send(load))

    def settle(self, begin: BeginUpdate) -> None:
        """See `Carrier`: engines may read the folder until they have answered the commit."""
        if self._scratch is not None:
            shutil.rmtree(self._path(begin), ignore_errors=True)

    def _path(self, begin: BeginUpdate) -> Path:
        parent = self._folder if self._scratch is None else self._scratch.path
        return parent / f"weight_v{begin.version:06d}"

    def close(self) -> None:
        """See `Carrier`."""
        scratch, self._scratch = self._scratch, None
        if scratch is not None:
            scratch.close()


def load(begin: BeginUpdate, path: Path, target: UpdateTarget) -> UpdateReport:
    """One whole update of one engine from a safetensors folder that exists already.

    A failure at any point aborts the update, and the engine serves what it served before.
    """
    begin = owned(begin, draw_owner())
    version, owner = begin.version, begin.owner
    committed = False
    try:
        target.send(begin)
        target.send(LoadFromDisk(path=str(path), owner=owner))
        report = target.send(CommitUpdate(version=version, owner=owner)).report
        committed = True
    finally:
        if not committed:
            try_send(target, AbortUpdate(version=version, owner=owner))
    assert report is not None, "a commit must report what it moved"
    return report


def write(
    path: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    delta: FolderDelta | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write safetensors files into `path`, atomically. Returns `path`.

    The folder gets its name once everything in it is on the disk, the index last; until then,
    and after a failure, there is nothing at `path` that was not there before. Each tensor is
    copied to the host before the next is asked for, about `shard_bytes` of them at a time.
    Raises WeightUpdateError, naming the folder, when it cannot be written.
    delta: says that these are changes only, and against which version.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with _writing(path):
            partial.mkdir(parents=True)
        _write_shards(partial, tensors, shard_bytes)
        with _writing(path):
            if delta is not None:
                _write_bytes(partial / DELTA_FILE, msgspec.json.encode(delta))
            _sync_folder(partial)
            _put_in_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int
) -> None:
    """Files of about `shard_bytes`, under the names that transformers gives them; with more
    than one, an index that says what is where."""
    shards: list[list[str]] = []
    total = 0
    for contents in _in_shards(tensors, shard_bytes):
        file = folder / f"shard-{len(shards)}"
        with _writing(file):
            save_file(contents, file, metadata={"format": "pt"})
            _sync(file)
        shards.append(list(contents))
        total += sum(tensor.nbytes for tensor in contents.values())
    with _writing(folder):
        _name_shards(folder, shards, total)


def _name_shards(folder: Path, shards: Sequence[Sequence[str]], total: int) -> None:
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for place, names in enumerate(shards):
        name = f"model-{place + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{place}").rename(folder / name)
        weight_map.update(dict.fromkeys(names, name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_bytes(folder / "model.safetensors.index.json", msgspec.json.encode(index))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raise WeightUpdateError, naming the path, for what goes wrong with files inside; not
    around the source, whose own errors are its own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WeightUpdateError(f"cannot write {path}: {error}", field="folder") from error


def _in_shards(
    tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Copies on the host, in runs of about `shard_bytes`; one run at least."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        # A copy, since the source may write the next tensor into the same memory.
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
    yield shard


def _put_in_place(partial: Path, path: Path) -> None:
    """Give a finished folder its name; one that is there already makes way whole."""
    old = path.with_name(f"{partial.name}.old")
    if os.path.lexists(path):
        path.rename(old)
    partial.rename(path)
    _sync_folder(path.parent)
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink(missing_ok=True)


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _sync(path)


def _sync(path: Path) -> None:
    """Wait until a file is on the disk, where another machine may read it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
