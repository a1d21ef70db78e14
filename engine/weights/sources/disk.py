"""A folder that a trainer wrote, as the tensors of the open update.

`delta.json` in it says that the folder holds only what changed since the version it names. Any
other folder holds the whole model, unless the command says that it is partial. Everything is
checked by the files' headers before the first tensor is taken in, and read before the reply.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec
import torch

from engine.errors import (
    CheckpointError,
    ChecksumMismatch,
    ManifestMismatch,
    ModelNotFound,
    UpdateOrder,
)
from engine.models.weight_files import is_folder, read_small, shown, unfinished
from engine.numerics import dtype_name
from engine.protocol import DELTA_FILE, FolderDelta, LoadFromDisk, TensorPiece, TensorSpec
from engine.weights.checksum import checksum
from engine.weights.helpers import nothing
from engine.weights.lane import Look
from engine.weights.session import UpdateSession
from engine.weights.sources import safetensors


def receive(session: UpdateSession, command: LoadFromDisk, look: Look = nothing) -> None:
    """Feed the open update with the safetensors files at `command.path`. look: called before each
    tensor is read; what it raises ends the command, and the update is to be aborted.

    Raises ModelNotFound or CheckpointError for files that are missing, broken or not yet whole,
    UpdateOrder for a delta against another version than the one that serves, ManifestMismatch
    for tensors that may not come, for a delta whose files are not what it says, and for a folder
    that lacks tensors of the model and is not `partial`. Nothing was taken in then. Raises
    ChecksumMismatch, naming the tensor, for bits that are not those a delta lists.
    """
    session.require_owned("load", command.owner)
    path = Path(command.path)
    writing = unfinished(path)
    if writing is not None:
        raise CheckpointError(
            f"{shown(path)} is still being written: {writing.name} is there; load it once it is "
            "whole, or remove that file",
            field="path",
        )
    delta = _read_delta(path / DELTA_FILE) if is_folder(path) else None
    if delta is not None:
        _check_order(session, delta)
    listing = safetensors.open_listing(path)
    if delta is not None:
        _check_listed(delta, listing)
    _check_entries(session, listing)
    if delta is None and not command.partial:
        _require_whole(session, listing)
    tensors = listing.tensors()
    if delta is not None:
        tensors = _with_sums(tensors, delta, session.require_open("load").announced)
    session.receive(_looking(tensors, look))


def _looking(
    tensors: Iterable[tuple[str, torch.Tensor]], look: Look
) -> Iterator[tuple[str, torch.Tensor]]:
    for named in tensors:
        look()
        yield named
        # Not held while the next is read.
        del named


def _check_entries(session: UpdateSession, listing: safetensors.Listing) -> None:
    seen: dict[str, Path] = {}
    for entry in listing.entries:
        try:
            for unit in session.catalog.units(entry.name):
                if unit in seen:
                    raise ManifestMismatch(f"{unit} is in {seen[unit].name} too", field=unit)
                seen[unit] = entry.file
            dtype = dtype_name(entry.dtype)
            session.expect_one(TensorPiece(entry.name, dtype, list(entry.shape)))
        except ManifestMismatch as error:
            raise ManifestMismatch(
                f"{error.message} ({shown(entry.file)})", field=error.field
            ) from error


def _require_whole(session: UpdateSession, listing: safetensors.Listing) -> None:
    missing = session.catalog.missing(entry.name for entry in listing.entries)
    if missing:
        rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ManifestMismatch(
            f"{shown(listing.path)} lacks {missing[0]}{rest}; write every tensor of the model, "
            "or say that the folder is partial",
            field=missing[0],
        )


def _check_listed(delta: FolderDelta, listing: safetensors.Listing) -> None:
    expected = {spec.name: spec for spec in delta.tensors}
    wrong = sorted(expected.keys() ^ {entry.name for entry in listing.entries})
    if wrong:
        raise ManifestMismatch(
            f"{wrong[0]} is {'listed' if wrong[0] in expected else 'there'} and not "
            f"{'there' if wrong[0] in expected else 'listed'} in {DELTA_FILE}",
            field=wrong[0],
        )
    for entry in listing.entries:
        spec = expected[entry.name]
        dtype = dtype_name(entry.dtype)
        if (spec.dtype, tuple(spec.shape)) != (dtype, entry.shape):
            raise ManifestMismatch(
                f"{entry.name} is {dtype} {list(entry.shape)} in {shown(entry.file)}, listed in "
                f"{DELTA_FILE} as {spec.dtype} {list(spec.shape)}",
                field=entry.name,
            )


def _with_sums(
    tensors: Iterable[tuple[str, torch.Tensor]],
    delta: FolderDelta,
    announced: Mapping[str, TensorSpec],
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same, each compared with the checksum that the delta lists, if any; the commit does so
    for those that were `announced` with one. Raises ChecksumMismatch."""
    sums = {spec.name: spec.checksum for spec in delta.tensors}
    for name, tensor in tensors:
        expected = sums[name]
        known = name in announced and announced[name].checksum is not None
        if expected is not None and not known and (found := checksum(tensor)) != expected:
            raise ChecksumMismatch(
                f"{name} has checksum {found:#018x}, listed in {DELTA_FILE} is {expected:#018x}",
                field=name,
            )
        yield name, tensor
        # Not held while the next is read.
        del tensor


def _read_delta(path: Path) -> FolderDelta | None:
    try:
        raw = read_small(path)
    except ModelNotFound:
        return None
    try:
        return msgspec.json.decode(raw, type=FolderDelta)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{shown(path)} cannot be read: {error}", field="path") from error


def _check_order(session: UpdateSession, delta: FolderDelta) -> None:
    if delta.base_version != session.version:
        raise UpdateOrder(
            f"the delta changes version {delta.base_version}, and {session.version} serves: load "
            "the deltas between, or a whole version",
            field="base_version",
        )
    if delta.version != session.open_version:
        raise UpdateOrder(
            f"the delta leads to version {delta.version}, the open update to "
            f"{session.open_version}",
            field="version",
        )
