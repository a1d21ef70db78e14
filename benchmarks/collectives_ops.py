"""The ops of `benchmarks/collectives.py`: how each is called, what it has to give, what else does
the same."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import checkout  # noqa: F401
import torch

from engine.parallel.connect import connect
from engine.parallel.mesh import Mesh
from engine.parallel.symmetric import SymmetricCollectives
from kernels.collectives import NUM_LANES, reference
from kernels.collectives import triton as own
from kernels.collectives.plan import Cut
from kernels.norm.triton import add_rms_norm
from kernels.torch_compat import map_symmetric, symmetric_empty

EPS = 1e-6
Call = Callable[[], Any]


class Peers:
    """The other ranks: by mapped memory, by NCCL and over the host."""

    def __init__(self, rank: int, size: int, place: str) -> None:
        self.rank, self.size = rank, size
        device = torch.device("cuda", rank)
        mesh = Mesh(tp_rank=rank, tp_size=size)
        self.group = connect(mesh, device, meeting_place=place, timeout_s=120.0)
        if not isinstance(self.group, SymmetricCollectives):
            raise RuntimeError(f"no mapped memory here: {self.group.description}")
        self.mailbox = self.group._mapping.mailbox
        self.nccl = self.group._rest

    def meet(self) -> None:
        """Wait for the device and for the others."""
        torch.cuda.synchronize()
        self.group.minimum(0)

    def largest(self, value: float) -> float:
        """The most of what the ranks have, to a thousandth."""
        return -self.group.minimum(-round(value * 1000)) / 1000

    def give_up(self) -> None:
        self.group.abort()


@dataclass(frozen=True)
class Op:
    """One collective.

    shape: of x by its length and the number of ranks. run: the op on this rank's x, a tuple.
    want: what it has to give, of all ranks' x. in_pieces: whether it takes more than fits the
    mailbox.
    """

    shape: Callable[[int, int], tuple[int, ...]]
    run_on: Callable[[torch.Tensor, Inputs, Peers], Any]
    want_of: Callable[[list[torch.Tensor], Inputs, Peers], Any]
    in_pieces: bool = False

    def takes(self, length: int, dtype: torch.dtype, peers: Peers) -> bool:
        """Whether it is what the op takes, and fits the mailbox."""
        num_bytes = length * dtype.itemsize
        if self is OPS["normed"]:
            rows, width = self.shape(length, peers.size)
            row_words = width * dtype.itemsize // 4
            if width > 16384 or not row_words:
                return False
            if rows > NUM_LANES * (peers.mailbox.lane_words // row_words):
                return False
        fits = self.in_pieces or num_bytes <= peers.mailbox.source_bytes
        return num_bytes % 4 == 0 and fits

    def run(self, inputs: Inputs, peers: Peers) -> tuple[torch.Tensor, ...]:
        return _tuple(self.run_on(inputs.parts[peers.rank], inputs, peers))

    def want(self, inputs: Inputs, peers: Peers) -> tuple[torch.Tensor, ...]:
        return _tuple(self.want_of(inputs.parts, inputs, peers))


class Inputs:
    """What all ranks hold, the same on every rank."""

    def __init__(self, parts: list[torch.Tensor], residual: torch.Tensor, weight: torch.Tensor):
        self.parts, self.residual, self.weight = parts, residual, weight

    @classmethod
    def drawn(cls, peers: Peers, op: Op, length: int, dtype: torch.dtype, seed: int) -> Inputs:
        """Random, by the seed."""
        shape = op.shape(length, peers.size)
        generator = torch.Generator().manual_seed(seed)

        def draw(shape: Sequence[int]) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to("cuda", dtype)

        return cls([draw(shape) for _ in range(peers.size)], draw(shape), draw(shape[-1:]))

    def at(self, step: torch.Tensor) -> Inputs:
        """Other values by the step, an int32 [] on the device."""
        factor = (step % 61 + 1).to(self.weight.dtype)
        return Inputs([part * factor for part in self.parts], self.residual, self.weight)


def _tuple(found: Any) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def _rows(length: int, size: int) -> tuple[int, ...]:
    return (length // 4096, 4096) if length % 4096 == 0 else (1, length)


OPS: dict[str, Op] = {
    "one shot": Op(
        lambda length, size: (length,),
        lambda x, inputs, peers: own.all_reduce(x, peers.mailbox, 1),
        lambda parts, inputs, peers: reference.all_reduce(parts),
        in_pieces=True,
    ),
    "two shot": Op(
        lambda length, size: (length,),
        lambda x, inputs, peers: own.all_reduce(x, peers.mailbox, 2),
        lambda parts, inputs, peers: reference.all_reduce(parts),
        in_pieces=True,
    ),
    "gather": Op(
        lambda length, size: (1, length),
        lambda x, inputs, peers: own.all_gather_rows(x, peers.mailbox),
        lambda parts, inputs, peers: reference.all_gather_rows(parts),
    ),
    "scatter": Op(
        lambda length, size: (size, length),
        lambda x, inputs, peers: own.reduce_scatter_rows(x, peers.mailbox),
        lambda parts, inputs, peers: reference.reduce_scatter_rows(parts, peers.rank),
    ),
    "normed": Op(
        _rows,
        lambda x, inputs, peers: own.all_reduce_add_rms_norm(
            x, inputs.residual, inputs.weight, EPS, peers.mailbox
        ),
        lambda parts, inputs, peers: add_rms_norm(
            reference.all_reduce(parts), inputs.residual, inputs.weight, EPS
        ),
    ),
}


def timed_ops(peers: Peers, rows: Sequence[int], width: int) -> Iterator[tuple[str, Call]]:
    """Every op at every number of rows, and what it stands beside."""
    own_box, nccl = peers.mailbox, peers.nccl
    weight = torch.ones(width, dtype=torch.bfloat16, device="cuda")
    torchs = _torch_ops(peers, 1024 * width)
    for count in rows:
        x = torch.randn(count, width, device="cuda").bfloat16()
        residual, in_place = torch.randn_like(x), x.clone()
        room = own_box.source_bytes
        title = f"all-reduce {count}"
        if x.nbytes <= room:
            yield f"{title} one shot", lambda x=x: own.all_reduce(x, own_box, 1)
        if count > 1:
            yield f"{title} two shot", lambda x=x: own.all_reduce(x, own_box, 2)
        yield f"{title} NCCL", lambda x=in_place: nccl.all_reduce(x)
        for name, call in torchs if count <= 1024 else ():
            yield f"{title} torch {name}", lambda call=call, x=x: call(x.numel())
        title = f"all-reduce, norm {count}"
        if -(-count // NUM_LANES) * width // 2 <= own_box.lane_words:
            yield (
                f"{title} fused",
                lambda x=x, r=residual: own.all_reduce_add_rms_norm(x, r, weight, EPS, own_box),
            )
        for shots, name in ((1, "one shot"), (2, "two shot")):
            yield (
                f"{title} {name}",
                lambda x=x, r=residual, shots=shots: add_rms_norm(
                    own.all_reduce(x, own_box, shots), r, weight, EPS
                ),
            )
        yield (
            f"{title} NCCL",
            lambda x=in_place, r=residual: add_rms_norm(nccl.all_reduce(x), r, weight, EPS),
        )
        if x.nbytes <= room:
            yield f"gather {count} own", lambda x=x: own.all_gather_rows(x, own_box)
        yield f"gather {count} NCCL", lambda x=x: nccl.all_gather_rows(x)
        wide = torch.randn(count * peers.size, width, device="cuda").bfloat16()
        if x.nbytes <= room:
            yield f"scatter {count} own", lambda x=wide: own.reduce_scatter_rows(x, own_box)
        yield f"scatter {count} NCCL", lambda x=wide: nccl.reduce_scatter_rows(x)


def _torch_ops(peers: Peers, most: int) -> list[tuple[str, Callable[[int], Any]]]:
    """torch's own ops over symmetric memory, where they are there."""
    try:
        space = symmetric_empty(most // 2, torch.device("cuda", peers.rank))
        store = peers.group._mapping._store
        kept = map_symmetric(space, "torchs", store, peers.rank, peers.size)
        x = space.view(torch.bfloat16).zero_()
        found = []
        for name in ("one_shot", "two_shot"):
            op = getattr(torch.ops.symm_mem, f"{name}_all_reduce{'_' * (name == 'two_shot')}")

            def call(n: int, op: Any = op, kept: Any = kept) -> Any:
                return op(x[:n], "sum", "torchs")

            call(4096)
            torch.cuda.synchronize()
            found.append((name, call))
        return found
    except (RuntimeError, AttributeError) as error:
        if peers.rank == 0:
            sys.stdout.write(f"torch's own ops are left out: {str(error).splitlines()[:1]}\n")
        return []


_CUTS = [
    Cut(128, 1),
    Cut(256, 1),
    Cut(256, 2),
    Cut(512, 2),
    Cut(512, 4),
    Cut(1024, 4),
    Cut(1024, 8),
    Cut(2048, 8),
    Cut(2048, 16),
    Cut(4096, 16),
]


def tuned_ops(peers: Peers, rows: Sequence[int], width: int) -> Iterator[tuple[str, Call]]:
    """Every cut for all-reduces by one shot and two."""
    box = peers.mailbox
    for count, shots in itertools.product(rows, (1, 2)):
        x = torch.randn(count, width, device="cuda").bfloat16()
        share = x.nbytes if shots == 1 else x.nbytes * 2 / peers.size
        if share > box.source_bytes:
            continue
        for cut, programs in itertools.product(_CUTS, (16, 32, 64, 128)):
            words = x.nbytes // 4 if shots == 1 else x.nbytes // 4 // peers.size
            lane = box.lane_words // shots
            tiles = -(-words // cut.tile)
            # Fewer programs than tiles only; then as many as there are tiles is one cut.
            used = min(programs, tiles)
            if -(-tiles // used) * cut.tile > lane or (programs > 16 and programs // 2 >= tiles):
                continue
            chosen = replace(cut, programs=programs)
            yield (
                f"{count} rows {shots} shot {cut.tile} x {cut.warps} warps, {used}",
                lambda x=x, chosen=chosen, shots=shots: own.all_reduce(x, box, shots, chosen),
            )
