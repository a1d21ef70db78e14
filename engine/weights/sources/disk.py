"""A folder that a trainer wrote, as the tensors of the open update.

`delta.json` in it says that the folder holds only what changed since the version it names.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from engine.errors import CheckpointError, ManifestMismatch, UpdateOrder
from engine.protocol import TensorSpec
from engine.weights.session import UpdateSession
from engine.weights.sources import safetensors

DELTA_FILE = "delta.json"


class Delta(msgspec.Struct, frozen=True):
    """Contents of `delta.json`: the tensors of the folder, those that `version` changed."""

    base_version: int
    version: int
    tensors: list[TensorSpec]


def receive(session: UpdateSession, path: Path) -> None:
    """Feed the open update with the safetensors files at `path`.

    Raises ModelNotFound or CheckpointError for files that are missing or broken, UpdateOrder
    for a delta against another version than the one that serves, ManifestMismatch for a delta
    whose files are not what it says.
    """
    delta = _read_delta(path / DELTA_FILE)
    if delta is None:
        session.receive(safetensors.tensors(path), lasting=True)
        return
    _check_order(session, delta)
    expected = {spec.name for spec in delta.tensors}
    found = dict(safetensors.tensors(path))
    wrong = sorted(expected ^ found.keys())
    if wrong:
        raise ManifestMismatch(
            f"{wrong[0]} is {'listed' if wrong[0] in expected else 'there'} and not "
            f"{'there' if wrong[0] in expected else 'listed'} in {DELTA_FILE}",
            field=wrong[0],
        )
    session.receive(found.items(), lasting=True)


def _read_delta(path: Path) -> Delta | None:
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Delta)
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", field="path") from error


def _check_order(session: UpdateSession, delta: Delta) -> None:
    session.require_open("load")
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
