"""Collectives between GPUs of one host that map each other's memory.

They take a third of the time of NCCL's for the rows of a decode step, and give the same bits
whatever the batch. What is too large for them, or of a dtype that they do not take, goes by NCCL.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from engine.errors import EngineDead
from engine.parallel.collectives import Collectives, Norm, gather_last
from engine.parallel.gloo import GlooCollectives
from engine.parallel.mesh import Mesh
from engine.parallel.nccl import NcclCollectives
from engine.parallel.routes import MAILBOX_BYTES, routes_of
from kernels import collectives as ops
from kernels.torch_compat import (
    PrefixStore,
    Store,
    keep_for_ever,
    map_symmetric,
    symmetric_empty,
    unmap_symmetric,
)

logger = logging.getLogger(__name__)

_NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


class Mapping:
    """The memory that the ranks of one group have mapped: a mailbox, and what keeps it."""

    def __init__(self, words: torch.Tensor, mesh: Mesh, store: Store) -> None:
        """words: the `symmetric_empty` of this rank. Raises RuntimeError where a rank cannot be
        reached."""
        self._name = f"slipstream-{uuid.uuid4().hex}"
        self._store = store
        shape = ops.words_shape(mesh.tp_size, MAILBOX_BYTES)
        addresses, self._held = map_symmetric(words, self._name, store, mesh.tp_rank, mesh.tp_size)
        # Written by whichever thread gives up, in inference mode or not.
        with torch.inference_mode(False):
            give_up = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self.mailbox = ops.open_mailbox(mesh.tp_rank, words.view(shape), addresses, give_up)
        torch.cuda.synchronize(words.device)

    def give_up(self) -> None:
        """End every wait of a kernel, now and from now on."""
        self.mailbox.give_up.fill_(1)

    def close(self) -> None:
        """Forget the group; the memory is unmapped with this object. Raises RuntimeError where the
        device is in no state to be asked."""
        # torch unmaps in a destructor, where an error of the device would end the process.
        torch.cuda.synchronize(self.mailbox.words.device)
        unmap_symmetric(self._name)


class SymmetricCollectives:
    """Collectives of one rank by mapped memory, queued on the current stream.

    rest: the same ranks by NCCL, for what is not sent that way.
    """

    def __init__(self, mapping: Mapping, rest: NcclCollectives) -> None:
        self._mapping: Mapping | None = mapping
        self._size = mapping.mailbox.size
        self._routes = routes_of(self._size)
        self._rest = rest
        self._given_up = False
        self.description = f"mapped memory of {self._size} GPUs"

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in a tensor of its own where it does not go by NCCL."""
        shots = self._routes.shots(x.nbytes) if ops.can_send(x) else 0
        if not shots:
            return self._rest.all_reduce(x)
        return ops.all_reduce(x, self._joined(), shots=shots)

    def all_reduce_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Collectives`; few rows in one kernel."""
        if x.nbytes > self._routes.normed or not _can_norm(x, residual):
            return norm.add(self.all_reduce(x), residual)
        return ops.all_reduce_add_rms_norm(
            x, residual, norm.weight, norm.eps, self._joined(), weighting=norm.weighting
        )

    def all_gather_last(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Every rank's x [..., sizes[rank]] side by side."""
        return gather_last(x, sizes, lambda piece: self.all_gather_rows(piece[None]))

    def all_gather_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's rows below each other."""
        if x.nbytes > self._routes.gather or not ops.can_send(x):
            return self._rest.all_gather_rows(x)
        return ops.all_gather_rows(x, self._joined())

    def reduce_scatter_rows(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's rows of the sum."""
        num_bytes = x.nbytes // self._size
        if num_bytes > self._routes.scatter or num_bytes % 4 or not ops.can_send(x):
            return self._rest.reduce_scatter_rows(x)
        return ops.reduce_scatter_rows(x, self._joined())

    def minimum(self, value: int) -> int:
        """The least of every rank's value."""
        return self._rest.minimum(value)

    def agree(self, value: int) -> int:
        """The least of every rank's value."""
        return self._rest.agree(value)

    def abort(self) -> None:
        """Have kernels that wait for other ranks end, replayed ones too."""
        self._given_up = True
        if self._mapping is not None:
            self._mapping.give_up()
        self._rest.abort()

    def close(self) -> None:
        """Leave the group: the graphs are gone by now."""
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            # Closing waits for the device, on which a kernel may wait for a rank that left.
            mapping.give_up()
            try:
                mapping.close()
            except RuntimeError as error:
                logger.warning("mapped memory stays mapped: %s", _first_line(error))
                keep_for_ever(mapping)
        self._rest.close()

    def _joined(self) -> ops.Mailbox:
        if self._given_up or self._mapping is None:
            raise EngineDead("the ranks were given up", field="ranks")
        return self._mapping.mailbox


def map_or_not(
    rest: NcclCollectives, host: GlooCollectives, store: Store, mesh: Mesh, device: torch.device
) -> Collectives:
    """Collectives by mapped memory if every rank can, else `rest`, which then says why."""
    found, reason = _try_to_map(host, PrefixStore(f"symmetric {mesh.dp_rank}", store), mesh, device)
    if found is None:
        rest.description = f"NCCL ({reason})"
        logger.warning("collectives by NCCL alone: %s", reason)
        return rest
    logger.info("collectives by mapped memory, of %d MiB a rank", MAILBOX_BYTES >> 20)
    return SymmetricCollectives(found, rest)


def _try_to_map(
    host: GlooCollectives, store: Store, mesh: Mesh, device: torch.device
) -> tuple[Mapping | None, str]:
    """The mapping, or why there is none. After every step that may fail on one rank all agree,
    so that none waits for another."""
    words: Any = None
    reason = "another rank has no mapped memory"
    shape = torch.Size(ops.words_shape(mesh.tp_size, MAILBOX_BYTES))
    try:
        words = symmetric_empty(shape.numel(), device)
    except RuntimeError as error:
        reason = _first_line(error)
    if not host.minimum(int(words is not None)):
        return None, reason
    mapping = None
    try:
        with _without_multicast():
            mapping = Mapping(words, mesh, store)
    except RuntimeError as error:
        reason = _first_line(error)
    # Also the meeting that `open_mailbox` asks for.
    if host.minimum(int(mapping is not None)):
        return mapping, ""
    return None, reason


@contextmanager
def _without_multicast() -> Iterator[None]:
    """Have torch set up no multicast: it is not used, and setting it up can fail where mapping
    does not. A trainer in the same process may use it."""
    before = os.environ.get(_NO_MULTICAST)
    os.environ[_NO_MULTICAST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_MULTICAST]
        else:
            os.environ[_NO_MULTICAST] = before


def _can_norm(x: torch.Tensor, residual: torch.Tensor) -> bool:
    row_bytes = x.shape[-1] * x.element_size()
    return ops.can_send(x) and residual.is_contiguous() and row_bytes % 4 == 0


def _first_line(error: RuntimeError) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
