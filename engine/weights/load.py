"""Named tensors into parameters, every name exactly once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.errors import ManifestMismatch
from engine.layers.parameter import ShardedParameter


class Loadable(Protocol):
    """A model whose weights have Hugging Face names."""

    def weight_index(self) -> Mapping[str, tuple[ShardedParameter, str]]:
        """Each full tensor by name: the parameter and part it goes to."""
        ...

    def aliases(self) -> Mapping[str, str]:
        """Second names of tensors in the index."""
        ...

    def ignored_names(self) -> frozenset[str]:
        """Names that may come and are not needed."""
        ...


@dataclass(frozen=True)
class LoadReport:
    """What was placed: tensors, and bytes written on this rank."""

    num_tensors: int
    num_bytes: int


class Placer:
    """Places tensors one at a time and knows which are still to come.

    A tied tensor may come under either of its names or both; the values must then be
    equal. Owned by whoever loads: one `Placer` per load or update.
    """

    def __init__(self, model: Loadable) -> None:
        self._index = model.weight_index()
        self._aliases = model.aliases()
        self._ignored = model.ignored_names()
        self._placed: dict[str, str] = {}
        self._seen: set[str] = set()
        self._num_bytes = 0

    @property
    def missing(self) -> list[str]:
        """Tensors of the model that have not come, by name, in the model's order."""
        return [name for name in self._index if name not in self._placed]

    def place(self, name: str, tensor: torch.Tensor) -> None:
        """Write a full tensor into the model.

        Raises ManifestMismatch, having written nothing, for an unknown name, a name that
        came before, a wrong shape, a dtype that is no float, or a tied tensor that differs.
        """
        if name in self._seen:
            raise ManifestMismatch(f"{name} came twice", field=name)
        if name in self._ignored:
            self._seen.add(name)
            return
        parameter, part = self._target(name)
        canonical = self._aliases.get(name, name)
        if canonical in self._placed:
            self._check_tied(name, canonical, parameter, part, tensor)
        else:
            self._num_bytes += parameter.place(tensor, part, name=name)
            self._placed[canonical] = name
        self._seen.add(name)

    def finish(self, *, partial: bool = False) -> LoadReport:
        """Close the load. Raises ManifestMismatch if tensors are missing, unless `partial`."""
        missing = self.missing
        if missing and not partial:
            rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ManifestMismatch(f"{missing[0]}{rest} did not come", field=missing[0])
        return LoadReport(num_tensors=len(self._placed), num_bytes=self._num_bytes)

    def _target(self, name: str) -> tuple[ShardedParameter, str]:
        target = self._index.get(self._aliases.get(name, name))
        if target is None:
            raise ManifestMismatch(f"{name} is no tensor of this model", field=name)
        return target

    def _check_tied(
        self,
        name: str,
        canonical: str,
        parameter: ShardedParameter,
        part: str,
        tensor: torch.Tensor,
    ) -> None:
        if not parameter.holds(tensor, part, name=name):
            raise ManifestMismatch(
                f"{name} differs from {self._placed[canonical]}: this model ties the two",
                field=name,
            )


def load(
    model: Loadable, source: Iterable[tuple[str, torch.Tensor]], *, partial: bool = False
) -> LoadReport:
    """Place every tensor of `source` into `model`, in place.

    source: (Hugging Face name, full tensor) pairs, any order, dtype and device.
    partial: tensors that do not come keep their values.
    Raises ManifestMismatch naming the tensor: unknown, duplicate, missing, or misshapen.
    """
    placer = Placer(model)
    for name, tensor in source:
        placer.place(name, tensor)
    return placer.finish(partial=partial)
