"""A folder of this machine brought to a version that a trainer published.

`/pull_weights` calls it in a thread. The trainer writes `weight_v000001`, `weight_v000002`, ...
into `source`: whole checkpoints, or deltas whose index says so (see `pull_delta`), each against
the version before. Version 0 is the model the server was started with. The local folder ends
as a complete checkpoint, and `/update_weights_from_disk` on it is what loads it.

What is in `local` counts as a version only while the folder it was published in is as it was then:
another trainer may have published other weights under the same number.

A pull that dies leaves a mark, and the folder is refused as a source of weights until another
pull has brought it to a version. Every file is written beside the old one and renamed over it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import msgspec

from engine.errors import CheckpointError, InvalidRequest, ModelNotFound, UpdateTimeout
from rollout.files.disk_space import sync
from rollout.files.regular_file import Look, copy, read_small, touched, writing
from rollout.http.updates.pull_delta import apply_delta, read_delta

logger = logging.getLogger(__name__)

STATE_FOLDER = ".weight_sync"

_MARK = "unfinished"
_BESIDE = "beside"
_POLL_S = 0.05
_NAME = re.compile(r"weight_v\d{6,}")
_PRUNED = (".safetensors", ".safetensors.index.json")


class _State(msgspec.Struct):
    """Contents of `state.json`: the version, as SGLang writes it, and what it was published as.

    folder: where. files: see `_publication`. Both are "" in a file that SGLang wrote.
    """

    version: str
    folder: str = ""
    files: str = ""


def pull(
    local: Path, *, source: Path | None, base: Path, version: int, timeout_s: float = 3600.0
) -> None:
    """Bring `local` to `version`; nothing is done if it is there already.

    Starts from what `local` holds if only deltas lie between, else from the newest whole
    version, which is `base` for 0. Waits while somebody else pulls into the same folder. Nothing
    is made or written before the source has been looked at.

    Raises ModelNotFound for a version or file that is not there, InvalidRequest for a folder
    that may not be overwritten, CheckpointError for files that are not what they say or no
    regular files, and a version that could not be written; UnsupportedOption when a package is
    missing; UpdateTimeout after `timeout_s`, the folder being marked as unfinished.
    """
    look = _deadline(local, timeout_s)
    try:
        _require_ours(local, source, base)
        _require_source(local, source, base, version)
        with _locked(local, look):
            _pull(local, source, base, version, look)
    except OSError as error:
        raise CheckpointError(
            f"version {version} could not be pulled into {local}: {error}", field="pull_weights"
        ) from error


def require_pulled(folder: Path) -> None:
    """Raise CheckpointError if a pull into `folder` has not ended."""
    if os.path.lexists(folder / STATE_FOLDER / _MARK):
        raise CheckpointError(
            f"{folder} is between two versions: a pull into it has not ended; pull again",
            field="path",
        )


def _deadline(local: Path, timeout_s: float) -> Look:
    """What raises UpdateTimeout once `timeout_s` have passed."""
    end = time.monotonic() + timeout_s

    def look() -> None:
        if time.monotonic() > end:
            raise UpdateTimeout(
                f"the pull into {local} did not end within {timeout_s:g} s; pull again, or give "
                "it longer",
                field="timeout_s",
            )

    return look


def _require_source(local: Path, source: Path | None, base: Path, version: int) -> None:
    """Raise as the pull would for a source that is not there."""
    held = _held_version(local, source, base)
    if held == version:
        return
    first, _ = _chain(held, source, version)
    if first != held:
        _whole_files(base if first == 0 else _published(source, first))


def _pull(local: Path, source: Path | None, base: Path, version: int, look: Look) -> None:
    held = _held_version(local, source, base)
    if held is None and os.path.lexists(local / STATE_FOLDER / "state.json"):
        logger.warning(
            "%s is not built upon: it is not what %s and %s publish now", local, base, source
        )
    torn = os.path.lexists(local / STATE_FOLDER / _MARK)
    if torn and held is not None and held >= version:
        # Some files may be those of the version after.
        held = None
    if held == version and not torn:
        return
    try:
        _bring(local, held, source, base, version, look)
    except CheckpointError:
        if held is None:
            raise
        # What is held is not what its mark says: once more, from a whole version.
        _bring(local, None, source, base, version, look)


def _bring(
    local: Path, held: int | None, source: Path | None, base: Path, version: int, look: Look
) -> None:
    first, deltas = _chain(held, source, version)
    mark = local / STATE_FOLDER / _MARK
    os.close(touched(mark))
    if first != held:
        origin = base if first == 0 else _published(source, first)
        state = _state_of(first, origin)
        _copy_whole(origin, local, look)
        if _state_of(first, origin) != state:
            raise CheckpointError(
                f"{origin} was written anew while it was copied: {local} may be a mixture; pull "
                "again",
                field="source_dir",
            )
        _note(local, state)
    for number, folder in enumerate(deltas, first + 1):
        state = _state_of(number, folder)
        beside = local / STATE_FOLDER / _BESIDE
        apply_delta(folder, local, version=number, beside=beside, look=look)
        _note(local, state)
    mark.unlink()


def _chain(held: int | None, source: Path | None, version: int) -> tuple[int, list[Path]]:
    """The version to start from, which is `held` or a whole one, and the deltas from there."""
    first = version
    deltas: list[Path] = []
    while first > 0 and first != held:
        folder = _published(source, first)
        if read_delta(folder) is None:
            break
        deltas.append(folder)
        first -= 1
    return first, deltas[::-1]


def _published(source: Path | None, version: int) -> Path:
    if source is None:
        raise InvalidRequest(
            f"version {version} needs source_dir, the folder of all versions", field="source_dir"
        )
    folder = _folder_of(source, version)
    if not folder.is_dir():
        raise ModelNotFound(f"{folder} is not there", field="source_dir")
    return folder


def publications(source: Path | None, version: int) -> list[Path]:
    """The folders of `source` that a pull to `version` may read."""
    if source is None or not source.is_dir():
        return []
    return [
        folder
        for folder in sorted(source.iterdir())
        if _NAME.fullmatch(folder.name) and int(folder.name.removeprefix("weight_v")) <= version
    ]


def _folder_of(source: Path, version: int) -> Path:
    return source / f"weight_v{version:06d}"


def _require_ours(local: Path, source: Path | None, base: Path) -> None:
    """A client names the folder, and files in it are replaced: only one that is empty, a
    checkpoint or was pulled into before, and no source of what is copied."""
    if source is not None and local.resolve() in (source.resolve(), *source.resolve().parents):
        raise InvalidRequest(
            f"{local} holds source_dir, and is written over", field="local_checkpoint_dir"
        )
    if source is not None and source.resolve() in local.resolve().parents:
        raise InvalidRequest(
            f"{local} is inside source_dir, and is written over", field="local_checkpoint_dir"
        )
    if _holds_model(local.resolve(), base.resolve()):
        raise InvalidRequest(
            f"{local} is, holds or lies inside the model this server was started with, which "
            "stays version 0",
            field="local_checkpoint_dir",
        )
    if not local.is_dir():
        return
    names = set(os.listdir(local))
    if names and not names & {STATE_FOLDER, "config.json"}:
        raise InvalidRequest(
            f"{local} is no checkpoint (it has no config.json), and is not written over",
            field="local_checkpoint_dir",
        )


def _holds_model(local: Path, base: Path) -> bool:
    """Whether what is written to `local` could be a file of the model at `base`, a folder or a
    file: links of its files, as in a hub's cache, are followed. Both paths are resolved."""
    if not base.exists():
        return False
    inside = base.is_dir()
    folders = {base if inside else base.parent}
    if inside:
        folders |= {path.resolve().parent for path in base.iterdir() if path.is_file()}
        if local.is_relative_to(base):
            return True
    return any(folder.is_relative_to(local) for folder in folders)


@contextlib.contextmanager
def _locked(local: Path, look: Look) -> Iterator[None]:
    """One pull at a time into a folder, whichever thread or process it is of."""
    folder = local / STATE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink():
        raise InvalidRequest(f"{folder} is a link", field="local_checkpoint_dir")
    lock = touched(folder / "lock")
    try:
        while not _flocked(lock):
            look()
            time.sleep(_POLL_S)
        yield
    finally:
        os.close(lock)


def _flocked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _held_version(local: Path, source: Path | None, base: Path) -> int | None:
    """The version `local` holds of what `source` publishes, or None. After a pull that died, some
    of its files may be those of the version after."""
    try:
        state = msgspec.json.decode(read_small(local / STATE_FOLDER / "state.json"), type=_State)
        version = int(state.version)
    except (FileNotFoundError, msgspec.MsgspecError, ValueError):
        return None
    if version and source is None:
        # Nobody asks for more than what is held.
        return version
    folder = _folder_of(source, version) if version and source is not None else base
    now = _state_of(version, folder)
    # What is published no more cannot be looked at: then the place has to be the same.
    same = now.files == state.files if now.files else now.folder == state.folder
    return version if same else None


def _state_of(version: int, folder: Path) -> _State:
    """What `local` is once it was brought to what `folder` holds now."""
    return _State(
        version=f"{version:06d}", folder=str(folder.resolve()), files=_publication(folder)
    )


def _publication(folder: Path) -> str:
    """A digest of the names, sizes and times of the files in a folder, without reading them; "" if
    there is no such folder."""
    if not folder.is_dir():
        return ""
    found = blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.is_file():
            stat = path.stat()
            found.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return found.hexdigest()


def _note(local: Path, state: _State) -> None:
    write_whole(local / STATE_FOLDER / "state.json", msgspec.json.encode(state))


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    beside = path.with_name(path.name + ".tmp")
    with writing(beside) as file:
        file.write(data)
    beside.replace(path)


def _whole_files(origin: Path) -> list[Path]:
    """The files of the checkpoint in `origin`. Raises ModelNotFound where there is none."""
    if not origin.is_dir():
        raise ModelNotFound(
            f"{origin} is no folder of safetensors files, so it cannot be version 0",
            field="local_checkpoint_dir",
        )
    files = [path for path in sorted(origin.iterdir()) if path.is_file()]
    if not any(path.name.endswith(".safetensors") for path in files):
        raise ModelNotFound(f"{origin} has no safetensors files", field="source_dir")
    return files


def _copy_whole(origin: Path, local: Path, look: Look) -> None:
    """Make `local` a copy of the checkpoint in `origin`: its files, and no other weights."""
    files = _whole_files(origin)
    # Whatever dies from here on, no version is held.
    (local / STATE_FOLDER / "state.json").unlink(missing_ok=True)
    for path in files:
        beside = local / STATE_FOLDER / _BESIDE
        with writing(beside) as file:
            copy(path, file, look)
        beside.replace(local / path.name)
    names = {path.name for path in files}
    for path in local.iterdir():
        if path.name not in names and path.name.endswith(_PRUNED):
            path.unlink()
    sync(local)
