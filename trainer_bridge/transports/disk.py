"""Weights as a folder of safetensors that both sides can see: all of them, or what changed.

A folder is written under another name and renamed when whole, so an engine never reads half
of it. A delta folder names the version it changes, and the engine takes it on no other.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import torch
from msgspec.structs import replace
from safetensors.torch import save_file

from engine.protocol import BeginUpdate, CommitUpdate, LoadFromDisk, TensorSpec, UpdateReport
from trainer_bridge.adapters.base import WeightSource
from trainer_bridge.checksum import with_checksums
from trainer_bridge.control import UpdateTarget
from trainer_bridge.transports.base import Carrier, give_up, on_each, report_of

DELTA_FILE = "delta.json"


class Delta(msgspec.Struct, frozen=True):
    """What `delta.json` says of its folder: the tensors that `version` changed."""

    base_version: int
    version: int
    tensors: list[TensorSpec]


class DiskCarrier(Carrier):
    """Writes `folder/weight_v<version>` and has the engines load it.

    delta: from the second update on, write only the tensors whose checksum changed since the
    last one this carrier published. keep: leave the folders there.
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
        self._delta = delta
        self._keep = keep
        self._checksums: dict[str, int | None] = {}

    def prepare(self, begin: BeginUpdate, source: WeightSource) -> BeginUpdate:
        """The update that will be announced: of the changed tensors only, for a delta."""
        if not self._delta:
            return begin
        specs = with_checksums(begin.manifest, source.tensors())
        if self.published is None:
            return replace(begin, manifest=specs)
        self._checksums.update({spec.name: spec.checksum for spec in self.published.manifest})
        changed = [spec for spec in specs if self._checksums.get(spec.name) != spec.checksum]
        return replace(begin, manifest=changed, partial=True)

    def carry(self, begin: BeginUpdate, source: WeightSource) -> None:
        """See `Carrier`."""
        wanted = {spec.name for spec in begin.manifest}
        chosen = ((name, tensor) for name, tensor in source.tensors() if name in wanted)
        path = self._folder / f"weight_v{begin.version:06d}"
        delta = None
        if self.published is not None and self._delta:
            delta = Delta(self.published.version, begin.version, begin.manifest)
        write(path, chosen, delta=delta)
        try:
            load = LoadFromDisk(path=str(path))
            on_each(self.targets, lambda target: target.send(load))
        finally:
            if not self._keep:
                shutil.rmtree(path)

    def close(self) -> None:
        """See `Carrier`."""


def load(begin: BeginUpdate, path: Path, target: UpdateTarget) -> UpdateReport:
    """One whole update of one engine from a safetensors folder that exists already.

    A failure at any point aborts the update, and the engine serves what it served before.
    """
    committed = False
    try:
        target.send(begin)
        target.send(LoadFromDisk(path=str(path)))
        reply = target.send(CommitUpdate(version=begin.version))
        committed = True
    finally:
        if not committed:
            give_up([target], begin.version)
    return report_of([reply])


def write(
    path: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    delta: Delta | None = None,
) -> Path:
    """Write one safetensors file into `path`, atomically. Returns `path`.

    delta: says that these are changes only, and against which version.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    contents = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors}
    save_file(contents, partial / "model.safetensors", metadata={"format": "pt"})
    if delta is not None:
        (partial / DELTA_FILE).write_bytes(msgspec.json.encode(delta))
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
    return path
