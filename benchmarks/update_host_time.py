"""Host time of an update of many small tensors: `python benchmarks/update_host_time.py`.

A made-up model of 18,864 tensors of 16 numbers each, the count of a large mixture of experts,
goes through begin, receive, prepare and commit in every mode, lent, read as it comes, as pieces of
a transfer, and as excerpts from two trainer ranks, under the names of its tensors and fused, a
layer's in one; `plan` is what excerpts cost once, on both sides. Milliseconds of
each command: what is not proportional to the number of tensors shows here. With --gib G, a second
table says what reading G GiB of bfloat16 tensors for their checks takes beside placing them: the
finite check alone, and with checksums.

--tensors N, --device D, --json FILE.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import torch
from machine import describe

from engine.layers.parameter import ShardedParameter, whole
from engine.models.full_names import FusedTensor
from engine.protocol import BeginUpdate, ReceiveExcerpts, TensorPiece, TensorSpec
from engine.weights.checksum import Checksums
from engine.weights.finite import find_unfit
from engine.weights.receive_excerpts import ExcerptReceiver
from engine.weights.session import UpdateSession
from trainer_bridge.excerpt_plan import plan_command, plan_sends

NUM_TENSORS = 18_864
ELEMENTS = 16
A_LAYER = 384
"""Tensors that a fused one is."""
NAMINGS = ("each", "fused")
CASES = [
    (mode, how, naming)
    for naming in NAMINGS
    for mode in ("shadow", "undo", "in_place")
    for how in ("lent", "read", "pieces", "excerpts")
]
NUM_SENDERS = 2
REPEATS = 3


class Many:
    """A model of `count` tensors of `elements` numbers each."""

    def __init__(self, count: int, elements: int, dtype: torch.dtype, device: str) -> None:
        self._elements = elements
        self._index = {
            f"model.layers.{i // A_LAYER}.mlp.experts.{i % A_LAYER // 3}.w{i % 3}.weight": (
                ShardedParameter(
                    torch.zeros(elements, dtype=dtype, device=device), whole((elements,))
                ),
                "",
            )
            for i in range(count)
        }

    def weight_index(self) -> Mapping[str, tuple[ShardedParameter, str]]:
        """See `Loadable`."""
        return self._index

    def fused(self) -> Mapping[str, FusedTensor]:
        """All of a layer in one."""
        names = list(self._index)
        layers = [names[i : i + A_LAYER] for i in range(0, len(names), A_LAYER)]
        return {
            f"model.layers.{i}.mlp.experts.fused": FusedTensor(
                shape=(len(layer) * self._elements,), names=tuple(layer)
            )
            for i, layer in enumerate(layers)
        }

    def aliases(self) -> Mapping[str, str]:
        """No second names."""
        return {}

    def ignored_names(self) -> frozenset[str]:
        """Every tensor is needed."""
        return frozenset()


def measure(count: int, device: str) -> Iterator[dict[str, Any]]:
    """Milliseconds of each command, case by case; the best of a few."""
    model = Many(count, ELEMENTS, torch.float32, device)
    session = UpdateSession(model, version=0)
    sizes = {
        "each": dict.fromkeys(model.weight_index(), ELEMENTS),
        "fused": {name: fused.shape[0] for name, fused in model.fused().items()},
    }
    for mode, how, naming in CASES:
        new = {n: torch.ones(size, device=device) for n, size in sizes[naming].items()}
        manifest = [TensorSpec(name, "float32", [len(t)]) for name, t in new.items()]
        pieces = [TensorPiece(name, "float32", [len(t)]) for name, t in new.items()]
        excerpts, plan_ms = _planned(session, pieces) if how == "excerpts" else (None, 0.0)
        runs = []
        for _ in range(REPEATS):
            version = session.version + 1
            begin = BeginUpdate(version=version, manifest=manifest, mode=mode)  # type: ignore[arg-type]
            times = {
                "begin": _ms(lambda begin=begin: session.begin(begin)),
                "receive": _ms(partial(_receive, session, how, new, pieces, excerpts)),
                "prepare": _ms(lambda version=version: session.prepare(version)),
                "commit": _ms(lambda version=version: session.commit(version)),
            }
            runs.append({**times, "total": sum(times.values()), "plan": plan_ms})
        yield {
            "naming": naming,
            "mode": mode,
            "tensors": how,
            **min(runs, key=lambda run: run["total"]),
        }


class _Instant:
    """A group, and the groups of a rank, whose messages are there as soon as they are asked for,
    whatever they hold: numbers that are finite."""

    lands = True
    name = "g"
    names = ("g",)

    def __init__(self, device: str) -> None:
        self.look: Any = None
        self._device = device

    def empty(self, num_bytes: int) -> torch.Tensor:
        """See `Group`."""
        return torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)

    def receive(self, messages: Any, deadline: float, tensor: str) -> None:
        """See `Group`."""
        for buffer, _ in messages:
            buffer.zero_()

    def wait(self, ticket: None, deadline: float) -> None:
        """See `Group`."""

    def get(self, name: str) -> _Instant:
        """See `Groups`."""
        return self

    def senders(self, name: str) -> int:
        """See `Groups`."""
        return NUM_SENDERS

    def lend(self, name: str, memory: Any) -> None:
        """See `Groups`."""

    def leave(self, name: str) -> bool:
        """See `Groups`."""
        return True


def _planned(session: UpdateSession, pieces: list[TensorPiece]) -> tuple[ExcerptReceiver, float]:
    """A receiver with a plan, and the milliseconds that it took on both sides."""
    groups: Any = _Instant(str(session.device))
    receiver = ExcerptReceiver(session, groups)
    begin = BeginUpdate(
        version=0, manifest=[TensorSpec(piece.name, piece.dtype, piece.shape) for piece in pieces]
    )
    held = [
        [
            TensorPiece(
                piece.name,
                piece.dtype,
                piece.shape,
                piece.shape[0] * sender // NUM_SENDERS,
                piece.shape[0] * (sender + 1) // NUM_SENDERS,
            )
            for piece in pieces
        ]
        for sender in range(NUM_SENDERS)
    ]

    def plan() -> None:
        command = plan_command("g", begin, held, bucket_bytes=256 << 20, timeout_s=60.0)
        plan_sends(command, 0, [receiver.plan(command)])

    return receiver, _ms(plan)


def _receive(
    session: UpdateSession,
    how: str,
    new: dict[str, torch.Tensor],
    pieces: list[TensorPiece],
    excerpts: ExcerptReceiver | None,
) -> None:
    if excerpts is not None:
        excerpts.receive(ReceiveExcerpts(group="g"))
        return
    if how != "pieces":
        session.receive(new.items(), lasting=how == "lent")
        return
    session.expect(pieces)
    with session.receiving(pieces):
        session.feed(((piece, new[piece.name]) for piece in pieces), lasting=False)


def _ms(run: Callable[[], object]) -> float:
    _wait()
    started = time.perf_counter()
    run()
    _wait()
    return 1e3 * (time.perf_counter() - started)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def check_costs(gib: float, device: str) -> dict[str, float]:
    """Milliseconds to place `gib` GiB in 64 MiB tensors, and to read them for their checks."""
    elements = 32 << 20
    count = max(1, round(gib * 2**30 / (2 * elements)))
    model = Many(count, elements, torch.bfloat16, device)
    session = UpdateSession(model, version=0)
    new = {name: torch.ones_like(p.detach()) for name, (p, _) in model.weight_index().items()}
    served = [(name, tensor, tensor.dtype) for name, tensor in new.items()]

    def checksums() -> None:
        sums = Checksums()
        for name, tensor in new.items():
            sums.add(name, tensor)
        sums.scans()

    def best(run: Callable[[], object]) -> float:
        return min(_ms(run) for _ in range(5))

    return {
        "gib": 2 * elements * count / 2**30,
        "place_ms": best(lambda: session.catalog.place(new)),
        "finite_ms": best(lambda: find_unfit(served)),
        "checksum_and_finite_ms": best(checksums),
    }


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", type=int, default=NUM_TENSORS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gib", type=float, default=0.0, help="measure checks of this much")
    parser.add_argument("--json", type=Path, help="write the tables here")
    args = parser.parse_args()
    machine = {"machine": describe(), "torch": torch.__version__}
    sys.stdout.write(f"{describe()}, torch {torch.__version__}, {args.tensors} tensors, ms\n")
    columns = ("begin", "receive", "prepare", "commit", "total", "plan")
    sys.stdout.write(
        f"{'naming':<8}{'mode':<10}{'tensors':<9}" + "".join(f"{c:>9}" for c in columns) + "\n"
    )
    rows = []
    for row in measure(args.tensors, args.device):
        sys.stdout.write(f"{row['naming']:<8}{row['mode']:<10}{row['tensors']:<9}")
        sys.stdout.write("".join(f"{row[c]:>9.1f}" for c in columns) + "\n")
        rows.append(row)
    costs = check_costs(args.gib, args.device) if args.gib else {}
    for name, value in costs.items():
        sys.stdout.write(f"{name:<26}{value:>9.2f}\n")
    if args.json:
        args.json.write_text(json.dumps({**machine, "rows": rows, **costs}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
