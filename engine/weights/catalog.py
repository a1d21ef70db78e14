"""The full tensors a model is made of, by Hugging Face name, and how to write them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.errors import ManifestMismatch
from engine.layers.parameter import Part, ShardedParameter
from kernels.torch_compat import copy_together

_LARGE_BYTES = 1 << 20


def copy_each(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each source into its target, of the same dtype and shape, in the current stream. None
    of them is of an autograd graph.

    Small ones go in a few kernels together, since hundreds of them cost more to launch than to
    run; large ones are plain copies, which reach more of the bandwidth (H100, 15 GB: 11.2 ms in
    place of 13.6).
    """
    together: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        if target.nbytes >= _LARGE_BYTES:
            target.copy_(source, non_blocking=True)
            continue
        small_targets, small_sources = together.setdefault(target.dtype, ([], []))
        small_targets.append(target)
        small_sources.append(source)
    for small_targets, small_sources in together.values():
        copy_together(small_targets, small_sources)


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
class _Slot:
    """Where a full tensor goes.

    target: this rank's elements of it, a view of the live weights. part: which they are.
    """

    target: torch.Tensor
    part: Part
    num_bytes: int

    @classmethod
    def of(cls, parameter: ShardedParameter, key: str) -> _Slot:
        target = parameter.view_of(key)
        return cls(target, parameter.parts[key], target.numel() * target.element_size())

    def same_bytes(self, full: torch.Tensor) -> torch.Tensor | None:
        """The part of a full tensor that can be copied into `target` as one run of bytes."""
        target, part = self.target, self.part
        if full.dtype != target.dtype or full.device != target.device:
            return None
        if not (full.is_contiguous() and target.is_contiguous()):
            return None
        if part.shard.length == part.full_shape[part.dim]:
            return full
        if part.dim == 0:
            return full.narrow(0, part.shard.start, part.shard.length)
        return None


class Catalog:
    """A model's weight index, looked up once: names, shapes and storages do not change.

    device: where the weights are.
    """

    def __init__(self, model: Loadable) -> None:
        self._index = dict(model.weight_index())
        self._aliases = dict(model.aliases())
        self._ignored = model.ignored_names()
        self._slots: dict[str, _Slot] = {}
        self.device = next(iter(self._index.values()))[0].device

    @property
    def names(self) -> Iterable[str]:
        """Every tensor of the model, without second names."""
        return self._index.keys()

    @property
    def aliases(self) -> Mapping[str, str]:
        """Second names of tensors: that of a tied head."""
        return self._aliases

    def canonical(self, name: str) -> str:
        """The name of the tensor that `name` is a second name of, or itself."""
        return self._aliases.get(name, name)

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Raise ManifestMismatch unless the model has a tensor `name` of this full shape."""
        if name not in self._ignored:
            parameter, part = self.target(name)
            parameter.check(tuple(shape), part, name=name)

    def target(self, name: str) -> tuple[ShardedParameter, str]:
        """The parameter and part that hold `name`. Raises ManifestMismatch for an unknown one."""
        target = self._index.get(self.canonical(name))
        if target is None:
            raise ManifestMismatch(f"{name} is no tensor of this model", field=name)
        return target

    def view(self, name: str) -> torch.Tensor:
        """This rank's elements of a tensor: a view of the live weights."""
        return self._slot(name).target

    def written(self, names: Iterable[str]) -> list[str]:
        """The tensors of the model, once each, that placing `names` would write: without second
        names and without what goes nowhere."""
        return [n for n in dict.fromkeys(map(self.canonical, names)) if n not in self._ignored]

    def is_needed(self, name: str) -> bool:
        """Whether a tensor goes anywhere: checkpoints hold some that can be computed."""
        return name not in self._ignored

    def has(self, name: str) -> bool:
        """Whether `name` is that of a tensor of the model, or a second name of one."""
        return self.canonical(name) in self._index

    def dtype(self, name: str) -> torch.dtype:
        """The dtype a tensor is served in."""
        return self._slot(name).target.dtype

    def held_bytes(self, name: str) -> int:
        """Bytes of this rank's elements of a tensor; 0 for one that is not needed."""
        return 0 if name in self._ignored else self._slot(name).num_bytes

    def holds(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether placing a full tensor would change nothing; waits for the device."""
        parameter, part = self.target(name)
        return parameter.holds(tensor, part, name=name)

    def covered(self, names: Iterable[str]) -> set[str]:
        """The tensors of the model that `names` are names of."""
        found = set(names)
        for alias, name in self._aliases.items():
            if alias in found:
                found.remove(alias)
                found.add(name)
        return found - self._ignored

    def missing(self, names: Iterable[str]) -> list[str]:
        """Tensors of the model that are not among `names`, in the model's order."""
        left = self._index.keys() - self.covered(names)
        return [name for name in self._index if name in left] if left else []

    def full_bytes(self) -> int:
        """Bytes of all full tensors in the dtypes the model holds them in."""
        return sum(
            math.prod(parameter.parts[part].full_shape) * parameter.element_size()
            for parameter, part in self._index.values()
        )

    def place(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """Write this rank's slices of full tensors, in place; return the bytes written.

        Slices that are runs of the bytes they become are copied by `copy_each`, others written
        by `ShardedParameter.place`. Shapes and dtypes were checked before, and they are detached.
        """
        num_bytes = 0
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        for name, tensor in tensors.items():
            if name in self._ignored:
                continue
            slot = self._slot(name)
            num_bytes += slot.num_bytes
            source = slot.same_bytes(tensor)
            if source is None:
                parameter, part = self.target(name)
                parameter.place(tensor, part, name=name)
            else:
                targets.append(slot.target)
                sources.append(source)
        copy_each(targets, sources)
        return num_bytes

    def _slot(self, name: str) -> _Slot:
        slot = self._slots.get(name)
        if slot is None:
            slot = self._slots[name] = _Slot.of(*self.target(name))
        return slot
