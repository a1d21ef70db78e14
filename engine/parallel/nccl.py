"""Collectives between GPUs, which CUDA graphs can capture.

Legend: N ranks; `...` any dims.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Sequence
from typing import Any

import torch

from engine.errors import EngineDead
from engine.parallel.collectives import Norm, gather_last
from engine.parallel.gloo import GlooCollectives
from kernels.torch_compat import (
    AllgatherOptions,
    AllreduceOptions,
    ReduceScatterOptions,
    all_gather_flat,
    keep_for_ever,
    reduce_scatter_flat,
)

_ABORT_S = 5.0


class NcclCollectives:
    """Collectives of one rank in an NCCL group, queued on the current stream.

    host: the same ranks over gloo, for what is agreed while they start.
    """

    def __init__(self, group: Any, host: GlooCollectives) -> None:
        self._group: Any = group
        self._breaking: threading.Thread | None = None
        self._lock = threading.Lock()
        self._host = host
        self._size = group.size()
        # Queued on the caller's stream, not on one of the group's: a captured collective is
        # then a node between its neighbours, and no memory is held for another stream.
        self._sum = AllreduceOptions()
        self._sum.asyncOp = False
        self._side_by_side = AllgatherOptions()
        self._side_by_side.asyncOp = False
        self._sum_of_rows = ReduceScatterOptions()
        self._sum_of_rows.asyncOp = False
        self.description = "NCCL"

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        _join(self._joined().allreduce([x], self._sum))
        return x

    def all_reduce_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One after the other."""
        return norm.add(self.all_reduce(x), residual)

    def all_gather_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's rows below each other."""
        return self._gather(x).flatten(0, 1)

    def reduce_scatter_rows(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's rows of the sum."""
        out = x.new_empty(x.shape[0] // self._size, *x.shape[1:])
        _join(reduce_scatter_flat(self._joined(), out, x, self._sum_of_rows))
        return out

    def all_gather_last(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Every rank's x [..., sizes[rank]] side by side."""
        return gather_last(x, sizes, self._gather)

    def minimum(self, value: int) -> int:
        """The least of every rank's value."""
        return self._host.minimum(value)

    def agree(self, value: int) -> int:
        """The least of every rank's value."""
        return self._host.agree(value)

    def abort(self) -> None:
        """Break the communicator: kernels that wait for other ranks end, replayed ones too.

        Returns when it is broken, or after `_ABORT_S`: the kernels end at once, but NCCL then
        waits for graphs that captured the group, which may be the caller's to drop.
        """
        with self._lock:
            group, self._group = self._group, None
            if group is not None:
                self._breaking = _break(group)
        if self._breaking is not None:
            self._breaking.join(_ABORT_S)

    def close(self) -> None:
        """Leave the group, or wait again for one given up before: the graphs are gone by now.
        Not `shutdown`, which waits for the other ranks."""
        self.abort()
        self._host.close()

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        """Contiguous x [...] -> [N, ...]."""
        out = x.new_empty((self._size, *x.shape))
        _join(all_gather_flat(self._joined(), out, x, self._side_by_side))
        return out

    def _joined(self) -> Any:
        group = self._group
        if group is None:
            raise EngineDead("the ranks were given up", field="ranks")
        return group


def _break(group: Any) -> threading.Thread:
    """Abort `group` in a thread that may never return, with both in nobody's way at exit."""
    # The thread, and torch's own behind it, may still be in the group when the interpreter ends.
    keep_for_ever(group)
    thread = threading.Thread(target=group.abort, name="nccl-abort", daemon=True)
    thread.start()
    # So does a thread that comes back from C++ to an interpreter that has ended.
    atexit.register(thread.join, _ABORT_S)
    return thread


def _join(work: Any) -> None:
    """Order what follows on this stream behind the collective, where that is not so already:
    torch returns no handle for one queued on the current stream."""
    if work is not None:
        work.wait()
