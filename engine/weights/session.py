"""The update transaction: begin -> receive -> verify -> commit, or abort.

States: closed -> (begin) -> open -> (commit) -> closed at the new version,
                                  -> (abort, deadline, failure) -> closed at the old version.

In shadow mode what is received is held and no live weight touched; the commit verifies it and
then places it all between two steps, so a failed or dead update leaves the old version serving.
In in-place mode tensors are written as they come, and from the first of them until a commit
that covers what was torn the engine refuses to step; in undo mode what they replaced is kept,
and an update that ends otherwise puts it back. In no mode does a step see a mixture: before a
live weight is touched the session refuses to serve, and it serves again after a commit by all
ranks or once every weight that was touched has its old value.

One command runs at a time. Receiving may run on another thread than the steps, which only ask
`require_servable`; what was received is complete on the device when the command returns.

The ranks of a replica run the same commands in the same order. Where a rank may refuse what
the others accept (memory, a lost connection, its clock), they agree first: `agree` is the
minimum over ranks, and each command that may refuse calls it the same number of times.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from engine.errors import NoVersion, OutOfMemory, SlipstreamError, UpdateOrder, UpdateTimeout
from engine.memory import free_bytes
from engine.protocol import BeginUpdate, TensorPiece, TensorSpec, UpdateReport
from engine.protocol.deadlines import capped
from engine.transfer import wait_for
from engine.weights import commit, owner, verify
from engine.weights.agreement import Agreement, settle
from engine.weights.catalog import Catalog, Loadable
from engine.weights.expected import Expected
from engine.weights.modes import REFUSED, SHADOW, UNDO, choose_mode, undo_size
from engine.weights.staging import Arrived, OpenUpdate, batches
from engine.weights.torn import TornWeights
from engine.weights.undo import UndoCopy
from kernels.torch_compat import ran_out_of_memory

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
        self._version = version
        self._ranks = Agreement(agree)
        self._require_weights = require_weights
        self._free = free
        self._open: OpenUpdate | None = None
        self._last: tuple[str, UpdateReport] | None = None
        self._failure = ""
        self._torn = TornWeights()
        self._expected = Expected(self.catalog)

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
        return self._torn.refusal

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.catalog.device

    def require_servable(self) -> None:
        """Raise NoVersion while the weights may be a mixture. From any thread."""
        refusal = self._torn.refusal
        if refusal:
            raise NoVersion(refusal, field="version")

    def begin(self, command: BeginUpdate) -> OpenUpdate:
        """Open the update to `command.version`, and return it; the same again starts it again.

        Raises UpdateOrder when another update is open or the version does not go forward,
        ManifestMismatch when the manifest is not of this model, OutOfMemory when a shadow or an
        undo copy was asked for that does not fit, MemoryReleased while there are no weights.
        """
        self._drop_expired()
        if self._ranks.least(0 if self._failure else 1) == 0:
            # It failed on one rank: none of the others can finish it.
            self._close("")
        self._failure = ""
        announced: dict[str, TensorSpec] = {}
        mode, error, decided = REFUSED, None, False
        try:
            announced = self._announce(command)
            mode = choose_mode(command, self.catalog, self.device, self._free)
            decided = True
        except SlipstreamError as refusal:
            error, decided = refusal, True
        finally:
            # The other ranks wait for this one's answer, whatever happened here.
            mode = self._ranks.least(mode if decided else REFUSED)
        settle(error, mode != REFUSED)
        self._close("")
        undo = UndoCopy(*undo_size(command, self.catalog), self.device) if mode == UNDO else None
        self._torn.remember()
        now = time.monotonic()
        self._open = OpenUpdate(
            command,
            announced,
            in_place=mode < SHADOW,
            undo=undo,
            started=now,
            expires=now + capped(command.timeout_s),
        )
        return self._open

    def receive(
        self, tensors: Iterable[tuple[str, torch.Tensor]], *, lasting: bool = False
    ) -> None:
        """Take in whole tensors of this process.

        lasting: each stays as it is until the commit, which reads it; nothing is copied before.
        Else each is copied, or in undo and in-place mode written, before the next is asked for,
        and no reference to it is kept.
        Raises ManifestMismatch for a tensor the model or the manifest does not have, one that
        came before, or one of another shape or dtype. The update stays open after an error of
        ours: abort it. Any other error closes it.
        """
        update = self.require_open("receive")
        with self._taking_in(closes=False):
            for name, tensor in tensors:
                self._expected.check_whole(update, name, tensor)
                tensor = tensor.detach()
                if lasting:
                    update.lend(name, tensor, self.catalog)
                else:
                    if update.in_place:
                        self._torn.tear(self.catalog.written([name]), update.version)
                    update.take(name, tensor, self.catalog)
                # Not held while the source makes the next: it may be as large.
                del tensor

    def lend(
        self,
        pieces: Sequence[TensorPiece],
        tensors: Sequence[tuple[str, torch.Tensor]],
        refusal: SlipstreamError | None,
    ) -> None:
        """`receive` for lasting tensors that `expect` accepted. refusal: as in `receiving`."""
        self._ranks.join(self._expected.digest(pieces, refusal), refusal)
        update = self.require_open("receive")
        with self._taking_in(closes=False):
            for name, tensor in tensors:
                update.lend(name, tensor, self.catalog)
            verify.scan_staged(update, self.catalog)

    def expect(self, pieces: Sequence[TensorPiece]) -> None:
        """Raise ManifestMismatch unless all of `pieces` may come; nothing is changed."""
        self._expected.check_all(self.require_open("receive"), pieces)

    def expect_one(self, piece: TensorPiece) -> None:
        """Raise ManifestMismatch unless `piece` may come; nothing is changed."""
        self._expected.check(self.require_open("receive"), piece)

    @contextmanager
    def receiving(
        self, pieces: Sequence[TensorPiece], refusal: SlipstreamError | None = None
    ) -> Iterator[None]:
        """Surrounds a transfer that `feed` takes in. What breaks it closes the update.

        refusal: why this rank cannot take part, if so; it is raised, and no rank begins. Nor
        does any if the ranks are to take in different tensors (ManifestMismatch).
        """
        if refusal is None and self._open is not None and self._open.undo is not None:
            try:
                self._open.undo.reserve()
            except OutOfMemory as error:
                refusal = error
        self._ranks.join(self._expected.digest(pieces, refusal), refusal)
        update = self.require_open("receive")
        if update.in_place:
            names = self.catalog.written(piece.name for piece in pieces)
            self._torn.tear(names, update.version)
        with self._taking_in(closes=True):
            yield
            verify.scan_staged(update, self.catalog)

    def feed(self, pieces: Iterable[Arrived], *, lasting: bool) -> None:
        """Take in pieces and their elements, some of them together; see `OpenUpdate.add`.

        Returns once all were read, in the order of the current stream, unless `lasting`.
        """
        for batch in batches(pieces):
            self.require_open("receive").add(batch, self.catalog, lasting=lasting)
            # Not held while the next are made.
            del batch

    def keeps_memory(self) -> bool:
        """Whether memory that tensors arrive in can serve as their shadow."""
        return not self.require_open("receive").in_place

    def deadline(self, timeout_s: float) -> float:
        """When a transfer of the open update must be done, of time.monotonic."""
        return min(time.monotonic() + timeout_s, self.require_open("receive").expires)

    def prepare(self, version: int, who: str = "") -> None:
        """Verify all that came, as the commit would; raise what it would raise. Nothing is placed.

        who: the owner that the command names. The update's time starts anew. The commit that
        follows verifies nothing twice, but for what the trainer may have changed: what it lent.
        """
        if self._verified(version, who, placing=False) is None:
            assert self._open is not None, "what was verified is open"
            self._open.expires = time.monotonic() + capped(self._open.begin.timeout_s)

    def commit(self, version: int, who: str = "") -> UpdateReport:
        """Verify and place what came; `version` serves from the next step on.

        who: the owner that the command names. Returns once the copies are done on every rank.
        Committing the version that serves already returns its report again. Raises UpdateOrder,
        UpdateTimeout, ManifestMismatch, ChecksumMismatch, NonFiniteWeights or OutOfMemory; in
        shadow mode nothing was written then. What fails while placing is put back in undo mode,
        which closes the update; in the other modes the session refuses to serve, and the commit
        may be tried again.
        """
        repeated = self._verified(version, who, placing=True)
        if repeated is not None:
            return repeated
        update = self._open
        assert update is not None, "what was verified is open"
        placed = False
        try:
            report = self._ranks.run(lambda: commit.place(update, self.catalog, self._torn))
            placed = True
        finally:
            if not placed and update.undo is not None:
                self._close("placing it failed")
        self._torn.mend()
        self._version, self._open, self._last = version, None, (who, report)
        return report

    def abort(self, version: int, who: str = "") -> None:
        """Drop the open update; no error when there is none. Raises UpdateOrder for another's."""
        if self._drop_expired() or self._open is None:
            return
        owner.require_version(self._open, version)
        owner.require_owner(self._open, who, "abort")
        self._close("")

    def require_none_open(self, what: str) -> None:
        """Raise UpdateOrder while an update is open, whose undo copy or half of whose tensors
        `what` would spoil."""
        self._drop_expired()
        if self._open is not None:
            raise UpdateOrder(f"{what} refused: {owner.describe(self._open)}", field="version")

    def invalidate(self, reason: str) -> None:
        """The weights are gone: refuse to step until an update covered every tensor.

        An update that is still open is over; there is nothing to put its old values back into.
        """
        self._open, self._failure = None, reason
        self._torn.tear_all(self.catalog.names, self._version, reason)

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

    def require_owned(self, what: str, who: str) -> OpenUpdate:
        """`require_open` for a command of `who`. Raises UpdateOrder for an update of another."""
        update = self.require_open(what)
        owner.require_owner(update, who, what)
        return update

    def _announce(self, command: BeginUpdate) -> dict[str, TensorSpec]:
        self._require_weights()
        if self._open is not None:
            owner.require_begin(self._open, command)
        if command.version <= self._version:
            raise UpdateOrder(
                f"version {command.version} does not go forward: {self._version} serves now",
                field="version",
            )
        return self._expected.announced(command)

    def _verified(self, version: int, who: str, *, placing: bool) -> UpdateReport | None:
        """Raise unless all ranks can place what came, and got the same; see `_check_commit`."""
        repeated = self._ranks.run(lambda: self._check_commit(version, who, placing))
        update = self._open if repeated is None else None
        self._ranks.require_alike(0 if update is None else update.digest or 0)
        return repeated

    def _check_commit(self, version: int, who: str, placing: bool) -> UpdateReport | None:
        """Raise unless the open update can be placed; the report if it was already."""
        if self._open is None and self._last is not None and self._version == version:
            by, report = self._last
            if by == who and report.version == version:
                return report
        update = self.require_open("commit")
        owner.require_version(update, version)
        owner.require_owner(update, who, "commit")
        if update.is_empty and not update.announced:
            raise UpdateOrder(
                f"nothing came for version {version}: send tensors before the commit, or abort it",
                field="version",
            )
        commit.verify_all(update, self.catalog, self._torn, placing=placing)
        return None

    @contextmanager
    def _taking_in(self, *, closes: bool) -> Iterator[None]:
        """Surrounds whatever takes tensors in. An error of ours closes the update if `closes`;
        any other always does, since nobody knows what was done."""
        ours = False
        try:
            yield
            ours = True
            wait_for(self.device)
        except SlipstreamError as error:
            ours = True
            if closes:
                self._close(error.message)
            else:
                wait_for(self.device)
            raise
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            version = self._open.version if self._open is not None else -1
            self._close("memory ran out")
            raise OutOfMemory(
                f"no memory for the tensors of version {version} ({error}); begin with mode "
                "'in_place', or give the KV pool less",
                field="mode",
            ) from error
        finally:
            if not ours and self._open is not None:
                self._close("it was interrupted")

    def _drop_expired(self) -> bool:
        update = self._open
        if update is None or time.monotonic() < update.expires:
            return False
        self._close(f"it was not committed within {capped(update.begin.timeout_s):g} s")
        return True

    def _close(self, reason: str) -> None:
        """Drop the open update. reason: of a failure, kept for the errors that follow."""
        update, self._open = self._open, None
        if update is None:
            return
        if update.undo is not None:
            # Refused until the last of them is back.
            update.undo.put_back(self.catalog)
            self._torn.restored()
        self._failure = f"the update to version {update.version} failed: {reason}" if reason else ""
        if reason:
            logger.warning("%s; version %d stays", self._failure, self._version)
