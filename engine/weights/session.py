"""The update transaction: begin -> receive -> verify -> commit, or abort.

States: closed -> (begin) -> open -> (commit) -> closed at the new version,
                                  -> (abort, deadline, failure) -> closed at the old version.

In shadow mode what is received is held and no live weight touched; the commit verifies it and
then places it all between two steps, so a failed or dead update leaves the old version serving.
In in-place mode tensors are written as they come, and from the first of them until a commit
that covers what was torn the engine refuses to step; in undo mode what they replaced is kept,
and an update that ends otherwise puts it back. In no mode does a step see a mixture.

The ranks of a replica run the same commands in the same order. Where a rank may refuse what
the others accept (memory, a lost connection, its clock), they agree first: `agree` is the
minimum over ranks, and each command that may refuse calls it the same number of times.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from engine.errors import (
    ManifestMismatch,
    OutOfMemory,
    SlipstreamError,
    UpdateOrder,
    UpdateTimeout,
    WeightUpdateError,
)
from engine.memory import free_bytes
from engine.protocol import BeginUpdate, TensorPiece, TensorSpec, UpdateReport
from engine.weights import verify
from engine.weights.catalog import Catalog
from engine.weights.coverage import Coverage
from engine.weights.load import Loadable, load
from engine.weights.modes import REFUSED, SHADOW, UNDO, choose_mode, undo_size
from engine.weights.staging import OpenUpdate, bounds
from engine.weights.undo import UndoCopy

logger = logging.getLogger(__name__)


def _alone(value: int) -> int:
    return value


def _nothing_released() -> None:
    """The check of an engine whose weights are always there."""


class UpdateSession:
    """Owner of the weight version and of the open update of one rank.

    agree: the least of every rank's value. require_weights: raises MemoryReleased while the
    weights are released. free: bytes that a shadow may take.
    """

    def __init__(
        self,
        model: Loadable,
        *,
        version: int,
        agree: Callable[[int], int] = _alone,
        require_weights: Callable[[], None] = _nothing_released,
        free: Callable[[torch.device], int] = free_bytes,
    ) -> None:
        self.catalog = Catalog(model)
        self._model = model
        self._version = version
        self._agree = agree
        self._require_weights = require_weights
        self._free = free
        self._open: OpenUpdate | None = None
        self._last: UpdateReport | None = None
        self._failure = ""
        self._torn: dict[str, int] = {}
        self._refusal = ""
        self._before: tuple[dict[str, int], str] = ({}, "")
        self._announced: tuple[list[TensorSpec], bool, dict[str, TensorSpec]] | None = None
        self._expected: tuple[dict[str, TensorSpec], Sequence[TensorPiece]] | None = None

    @property
    def version(self) -> int:
        """The version that serves."""
        return self._version

    @property
    def open_version(self) -> int | None:
        """The version of the open update."""
        return None if self._open is None else self._open.version

    @property
    def refusal(self) -> str:
        """Why no step may run, if so."""
        return self._refusal

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.catalog.view(next(iter(self.catalog.names))).device

    def load_initial(self, source: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Fill the fresh model. Raises ManifestMismatch naming the tensor."""
        load(self._model, source)

    def require_servable(self) -> None:
        """Raise WeightUpdateError while the weights may be a mixture."""
        if self._refusal:
            raise WeightUpdateError(self._refusal, field="version")

    def begin(self, command: BeginUpdate) -> OpenUpdate:
        """Open the update to `command.version`, and return it; the same again starts it again.

        Raises UpdateOrder when another update is open or the version does not go forward,
        ManifestMismatch when the manifest is not of this model, OutOfMemory when a shadow or an
        undo copy was asked for that does not fit, MemoryReleased while there are no weights.
        """
        self._drop_expired()
        if self._agree(0 if self._failure else 1) == 0:
            # It failed on one rank: none of the others can finish it.
            self._close("")
        self._failure = ""
        announced: dict[str, TensorSpec] = {}
        mode, error = REFUSED, None
        try:
            announced = self._announce(command)
            mode = choose_mode(command, self.catalog, self.device, self._free)
        except SlipstreamError as refusal:
            error = refusal
        mode = self._agree(mode)
        self._settle(error, mode != REFUSED)
        self._close("")
        undo = UndoCopy(*undo_size(command, self.catalog), self.device) if mode == UNDO else None
        self._before = (dict(self._torn), self._refusal)
        now = time.monotonic()
        self._open = OpenUpdate(
            command,
            announced,
            in_place=mode < SHADOW,
            undo=undo,
            started=now,
            expires=now + command.timeout_s,
        )
        return self._open

    def receive(
        self, tensors: Iterable[tuple[str, torch.Tensor]], *, lasting: bool = False
    ) -> None:
        """Stage whole tensors. lasting: they stay as they are until the commit, and nothing is
        copied; else each is copied before the next is asked for.

        Raises ManifestMismatch for a tensor the model or the manifest does not have, one that
        came before, or one of another shape or dtype. The update stays open: abort it.
        """
        update = self.require_open("receive")
        for name, tensor in tensors:
            if not tensor.is_floating_point():
                raise ManifestMismatch(f"{name} has dtype {tensor.dtype}, not a float", field=name)
            dtype = str(tensor.dtype).removeprefix("torch.")
            piece = TensorPiece(name, dtype, list(tensor.shape))
            update.check(piece)
            self.catalog.check(name, piece.shape)
            update.lend(name, tensor if lasting else tensor.clone())

    def lend(
        self, tensors: Sequence[tuple[str, torch.Tensor]], refusal: SlipstreamError | None
    ) -> None:
        """`receive` for tensors that `expect` accepted. refusal: as in `receiving`."""
        self._settle(refusal, self._agree(1 if refusal is None else 0) == 1)
        update = self.require_open("receive")
        for name, tensor in tensors:
            update.lend(name, tensor)

    def expect(self, pieces: Sequence[TensorPiece]) -> None:
        """Raise ManifestMismatch unless all of `pieces` may come; nothing is changed."""
        update = self.require_open("receive")
        # A trainer sends the same tensors every time: looked through once is enough.
        known = self._expected if update.is_empty else None
        if known is not None and known[0] is update.announced and known[1] == pieces:
            return
        seen: dict[str, Coverage] = {}
        for piece in pieces:
            self.catalog.check(piece.name, piece.shape)
            update.check(piece)
            size = math.prod(piece.shape)
            coverage = seen.setdefault(piece.name, Coverage(piece.name, size))
            coverage.add(*bounds(piece))
        if update.is_empty:
            self._expected = (update.announced, pieces)

    @contextmanager
    def receiving(
        self, pieces: Sequence[TensorPiece], refusal: SlipstreamError | None = None
    ) -> Iterator[None]:
        """Surrounds a transfer that `feed` takes in. What breaks it closes the update.

        refusal: why this rank cannot take part, if so; it is raised, and no rank begins.
        """
        if refusal is None and self._open is not None and self._open.undo is not None:
            try:
                self._open.undo.reserve()
            except OutOfMemory as error:
                refusal = error
        agreed = self._agree(1 if refusal is None else 0) == 1
        self._settle(refusal, agreed)
        update = self.require_open("receive")
        if update.in_place:
            self._tear(pieces, update.version)
        done = False
        try:
            yield
            done = True
        except SlipstreamError as error:
            self._close(error.message)
            raise
        except torch.OutOfMemoryError as error:
            self._close("memory ran out")
            raise OutOfMemory(
                f"no memory for the tensors of version {update.version} ({error}); begin with "
                "mode 'in_place', or give the KV pool less",
                field="mode",
            ) from error
        finally:
            if not done and self._open is not None:
                self._close("it was interrupted")

    def feed(self, piece: TensorPiece, flat: torch.Tensor, *, lasting: bool) -> None:
        """Take in the elements of a piece; see `OpenUpdate.add`."""
        update = self.require_open("receive")
        update.check(piece)
        update.add(piece, flat, self.catalog, lasting=lasting)

    def keeps_memory(self) -> bool:
        """Whether memory that tensors arrive in can serve as their shadow."""
        return not self.require_open("receive").in_place

    def deadline(self, timeout_s: float) -> float:
        """When a transfer of the open update must be done, of time.monotonic."""
        return min(time.monotonic() + timeout_s, self.require_open("receive").expires)

    def prepare(self, version: int) -> None:
        """Raise what `commit` would raise; nothing is placed."""
        error: SlipstreamError | None = None
        try:
            self._check_commit(version)
        except SlipstreamError as refusal:
            error = refusal
        self._settle(error, self._agree(0 if error else 1) == 1)

    def commit(self, version: int) -> UpdateReport:
        """Verify and place what came; `version` serves from the next step on.

        Returns once the copies are done. Committing the version that serves already returns
        its report again. Raises UpdateOrder, UpdateTimeout, ManifestMismatch or
        ChecksumMismatch; in shadow mode nothing was written then.
        """
        error: SlipstreamError | None = None
        repeated: UpdateReport | None = None
        try:
            repeated = self._check_commit(version)
        except SlipstreamError as refusal:
            error = refusal
        self._settle(error, self._agree(0 if error else 1) == 1)
        if repeated is not None:
            return repeated
        assert self._open is not None
        report = self._place(self._open)
        self._version, self._open, self._last = version, None, report
        return report

    def abort(self, version: int) -> None:
        """Drop the open update; no error when there is none. Raises UpdateOrder for another's."""
        if self._drop_expired() or self._open is None:
            return
        if self._open.version != version:
            raise self._wrong_version(self._open, version)
        self._close("")

    def invalidate(self, reason: str) -> None:
        """The weights are gone: refuse to step until an update covered every tensor."""
        self._torn = dict.fromkeys(self.catalog.names, self._version)
        self._refusal = reason

    def require_open(self, what: str) -> OpenUpdate:
        """The open update. Raises UpdateOrder without one, UpdateTimeout when its time is up,
        MemoryReleased while there are no weights."""
        self._require_weights()
        if self._drop_expired():
            raise UpdateTimeout(self._failure, field="version")
        if self._open is None:
            why = f" ({self._failure})" if self._failure else ""
            raise UpdateOrder(f"{what} without an open update{why}; begin one", field="version")
        return self._open

    def _announce(self, command: BeginUpdate) -> dict[str, TensorSpec]:
        self._require_weights()
        if self._open is not None and self._open.begin != command:
            raise UpdateOrder(
                f"update to version {self._open.version} is open; commit or abort it before "
                f"beginning {command.version}",
                field="version",
            )
        if command.version <= self._version:
            raise UpdateOrder(
                f"version {command.version} does not go forward: {self._version} serves now",
                field="version",
            )
        known = self._announced
        if known is None or known[:2] != (command.manifest, command.partial):
            announced = verify.announced_tensors(
                command.manifest, self.catalog, partial=command.partial
            )
            known = self._announced = (command.manifest, command.partial, announced)
        return known[2]

    def _check_commit(self, version: int) -> UpdateReport | None:
        """Raise unless the open update can be placed; the report if it was already."""
        if self._open is None and self._last is not None and self._last.version == version:
            return self._last
        update = self.require_open("commit")
        if update.version != version:
            raise self._wrong_version(update, version)
        verify.require_complete(update, self.catalog, self._torn)
        verify.require_checksums(update, self.device)
        return None

    def _place(self, update: OpenUpdate) -> UpdateReport:
        self._refusal = (
            f"the commit of version {update.version} died while writing; the weights are a "
            "mixture. Publish a whole version to serve again"
        )
        staged = self._untied(update.staged)
        num_bytes = update.placed_bytes + self.catalog.place(staged)
        if self.device.type == "cuda":
            # The sender may change what it lent, and staged memory goes back, once this returns.
            torch.cuda.current_stream(self.device).synchronize()
        self._refusal, self._torn = "", {}
        return UpdateReport(
            version=update.version,
            num_tensors=len(self.catalog.covered(update.names)),
            num_bytes=num_bytes,
            seconds=time.monotonic() - update.started,
        )

    def _untied(self, staged: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Staged tensors without the second name of a tied one, which were compared."""
        twins = {n for n, other in self.catalog.aliases.items() if n in staged and other in staged}
        return {name: tensor for name, tensor in staged.items() if name not in twins}

    def _tear(self, pieces: Sequence[TensorPiece], version: int) -> None:
        names = {self.catalog.canonical(piece.name) for piece in pieces}
        self._torn.update(dict.fromkeys(names, version))
        self._refusal = (
            f"the update to version {version} is written in place and not committed: "
            f"{verify.and_more(sorted(names))} may be a mixture. Commit it, or publish a whole "
            "version, to serve again"
        )

    def _drop_expired(self) -> bool:
        update = self._open
        if update is None or time.monotonic() < update.expires:
            return False
        self._close(f"it was not committed within {update.begin.timeout_s:g} s")
        return True

    def _close(self, reason: str) -> None:
        """Drop the open update. reason: of a failure, kept for the errors that follow."""
        update, self._open = self._open, None
        if update is None:
            return
        if update.undo is not None:
            update.undo.put_back(self.catalog)
            self._torn, self._refusal = self._before
        self._failure = f"the update to version {update.version} failed: {reason}" if reason else ""
        if reason:
            logger.warning("%s; version %d stays", self._failure, self._version)

    def _settle(self, error: SlipstreamError | None, agreed: bool) -> None:
        """Raise this rank's error, or that another has one."""
        if error is not None:
            raise error
        if not agreed:
            raise WeightUpdateError(
                "another rank of this engine refuses; its error is reported too", field="ranks"
            )

    def _wrong_version(self, update: OpenUpdate, version: int) -> UpdateOrder:
        return UpdateOrder(
            f"the open update is to version {update.version}, not {version}", field="version"
        )
