"""The full tensors a model is made of, by Hugging Face name, and how to write them.

A *unit* is a tensor of the model's own weight index. Tensors come under the names of units, under
second names of them, or fused: one tensor that is several units. Everything that is noted of an
update is noted by unit, so that it does not matter how it came; and what is stored for a unit is
whatever its parameter says: one storage or several, once, more than once, or nothing of it here.

A unit that is stored encoded may come so: integers under its name, and their scales under a name
of their own, which is no unit. Neither is written without the other.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.errors import ManifestMismatch
from engine.layers.parameter import ShardedParameter
from engine.models.full_names import FusedTensor
from engine.numerics import dtype_name
from engine.protocol import StoredTensor
from engine.weights.excerpts import Excerpt, cut, excerpt_of
from kernels.quant import Index
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

    def fused(self) -> Mapping[str, FusedTensor]:
        """Tensors that may come in place of several of the index."""
        ...

    def aliases(self) -> Mapping[str, str]:
        """Second names of tensors in the index."""
        ...

    def ignored_names(self) -> Container[str]:
        """Names that may come and are not needed."""
        ...


@dataclass(frozen=True)
class _Slot:
    """Where a unit goes.

    targets: all that is stored for it, views of the live weights. source: the elements of the full
    tensor that make a run of bytes like those of the one target, () for all of them; None where
    there is no such run. excerpt: what is read of the full tensor, if it is one block.
    """

    targets: tuple[torch.Tensor, ...]
    num_bytes: int
    source: Index | None
    excerpt: Excerpt | None

    @classmethod
    def of(cls, parameter: ShardedParameter, key: str) -> _Slot:
        stored = list(parameter.stored(key))
        targets = tuple(view for _, views in stored for view in views)
        source: Index | None = None
        is_run = len(stored) == 1 and len(targets) == 1 and targets[0].is_contiguous()
        if is_run and parameter.codec.copies(targets[0].dtype):
            whole = tuple(targets[0].shape) == parameter.parts[key].full_shape
            source = () if whole else stored[0][0].source
        num_bytes = sum(target.nbytes for target in targets)
        return cls(targets, num_bytes, source, excerpt_of(parameter, key))

    def same_bytes(self, full: torch.Tensor) -> torch.Tensor | None:
        """The part of a full tensor that can be copied into the target as one run of bytes."""
        if self.source is None:
            return None
        target = self.targets[0]
        if full.dtype != target.dtype or full.device != target.device or not full.is_contiguous():
            return None
        if not self.source:
            return full
        part = full[self.source]
        return part if part.is_contiguous() else None

    def same_elements(self, excerpt: torch.Tensor) -> torch.Tensor | None:
        """An excerpt that can be copied into the target as it is."""
        live = self.live(excerpt.dtype)
        if live is None or excerpt.device != live.device or not excerpt.is_contiguous():
            return None
        return excerpt.view(live.shape)

    def live(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The target, if it is what an excerpt of `dtype` is, element by element in one run."""
        if self.source is None or self.targets[0].dtype != dtype:
            return None
        return self.targets[0]


def _ranges(index: Index, shape: Sequence[int]) -> list[tuple[int, int, int]]:
    """(start, stop, step) for every dim."""
    slices = [entry if isinstance(entry, slice) else slice(entry, entry + 1) for entry in index]
    return [entry.indices(size) for entry, size in zip(slices, shape, strict=True)]


def _beside(name: str, leaf: str) -> str:
    return f"{name.rpartition('.')[0]}.{leaf}"


class Catalog:
    """A model's weight index, looked up once: names, shapes and storages do not change.

    device: where the weights are.
    """

    def __init__(self, model: Loadable) -> None:
        self._index = dict(model.weight_index())
        self._fused = dict(model.fused())
        self._aliases = dict(model.aliases())
        self._ignored = model.ignored_names()
        self._slots: dict[str, _Slot] = {}
        self._scales = {
            _beside(name, parameter.codec.scale_leaf): name
            for name, (parameter, _) in self._index.items()
            if parameter.codec.scale_leaf
        }
        self.device = next(iter(self._index.values()))[0].device
        for name, fused in self._fused.items():
            size = sum(math.prod(self.shape(unit)) for unit in fused.names)
            assert size == math.prod(fused.shape), f"{name} is not the tensors it stands for"

    @property
    def names(self) -> Iterable[str]:
        """Every unit of the model."""
        return self._index.keys()

    @property
    def aliases(self) -> Mapping[str, str]:
        """Second names of tensors: that of a tied head."""
        return self._aliases

    def canonical(self, name: str) -> str:
        """The name of the tensor that `name` is a second name of, or itself."""
        return self._aliases.get(name, name)

    def units(self, name: str) -> tuple[str, ...]:
        """What comes under a name, in order: itself, or the units of a fused tensor. A second name
        stays what it is."""
        fused = self._fused.get(name)
        return (name,) if fused is None else fused.names

    def is_fused(self, name: str) -> bool:
        """Whether a tensor of this name is several units."""
        return name in self._fused

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a full tensor. Raises ManifestMismatch for an unknown name."""
        if name in self._fused:
            return self._fused[name].shape
        parameter, part = self.target(self._scales.get(name, name))
        shape = parameter.parts[part].full_shape
        return parameter.codec.scale_shape(shape) if name in self._scales else shape

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Raise ManifestMismatch unless the model has a tensor `name` of this full shape."""
        if not self.is_needed(name):
            return
        expected = self.shape(name)
        if tuple(shape) != expected:
            raise ManifestMismatch(
                f"{name} has shape {list(shape)}, the model expects {list(expected)}", field=name
            )

    def check_dtype(self, name: str, dtype: torch.dtype) -> None:
        """Raise ManifestMismatch for a dtype that a tensor of this name cannot come in."""
        if dtype.is_floating_point:
            return
        found = None if name in self._scales else self._index.get(self.canonical(name))
        if found is None or not found[0].codec.takes(dtype):
            raise ManifestMismatch(f"{name} has dtype {dtype_name(dtype)}, not a float", field=name)

    def other_half(self, name: str, dtype: torch.dtype) -> str:
        """The tensor without which one of this name and dtype is not written: the scales of an
        encoded one, or what scales are of. "" for any other."""
        if not self._scales:
            return ""
        if name in self._scales:
            return self._scales[name]
        if dtype.is_floating_point or name not in self._index:
            return ""
        return _beside(name, self._index[name][0].codec.scale_leaf)

    @property
    def has_scales(self) -> bool:
        """Whether any unit is stored with scales that may come with it."""
        return bool(self._scales)

    def are_scales(self, name: str) -> bool:
        """Whether a name is that of scales, which are no unit."""
        return name in self._scales

    def target(self, name: str) -> tuple[ShardedParameter, str]:
        """The parameter and part that hold a unit. Raises ManifestMismatch for an unknown one."""
        target = self._index.get(self.canonical(name))
        if target is None:
            raise ManifestMismatch(f"{name} is no tensor of this model", field=name)
        return target

    def views(self, name: str) -> tuple[torch.Tensor, ...]:
        """All that this rank stores for a unit: views of the live weights."""
        return self._slot(name).targets

    def floats(self, name: str) -> list[torch.Tensor]:
        """Those of `views` that show NaN and inf."""
        return [view for view in self.views(name) if view.is_floating_point()]

    def layout(self, name: str) -> StoredTensor:
        """What this rank stores of a unit, in the order of `views`."""
        parameter, key = self.target(name)
        part = parameter.parts[key]
        return StoredTensor(
            codec=parameter.codec.name,
            dtype=dtype_name(parameter.dtype),
            pieces=[_ranges(piece.source, part.full_shape) for piece in part.pieces],
        )

    def values(self, name: str, rows: int) -> torch.Tensor | None:
        """The first `rows` of this rank's values of a unit, as floats; None if it has none."""
        parameter, part = self.target(name)
        return parameter.decoded(part, rows)

    def written(self, names: Iterable[str]) -> list[str]:
        """The units, once each, that placing `names` would write: without second names and
        without what goes nowhere."""
        units = dict.fromkeys(self._expanded(names))
        if self._scales:
            units = dict.fromkeys(self._scales.get(unit, unit) for unit in units)
        return [unit for unit in units if self.is_needed(unit)]

    def is_needed(self, name: str) -> bool:
        """Whether a tensor goes anywhere: checkpoints hold some that can be computed."""
        return name in self._index or name not in self._ignored

    def has(self, name: str) -> bool:
        """Whether `name` is that of a tensor of the model, a second name of one, or fused."""
        return self.canonical(name) in self._index or name in self._fused

    def dtype(self, name: str) -> torch.dtype:
        """The float dtype that bounds what a tensor may hold: the one it is served in, where it
        is served as it comes."""
        parameter, _ = self.target(self._scales.get(name, self.units(name)[0]))
        return parameter.codec.range_dtype

    def held_bytes(self, name: str) -> int:
        """Bytes that this rank stores for a unit; 0 for one that is not needed."""
        return self._slot(name).num_bytes if self.is_needed(name) else 0

    def holds(self, name: str, tensor: torch.Tensor, *, is_excerpt: bool = False) -> bool:
        """Whether placing a full tensor, or its excerpt, would change nothing; waits for the
        device."""
        parameter, part = self.target(name)
        excerpt = self._slot(name).excerpt
        if is_excerpt:
            assert excerpt is not None, f"{name} comes whole"
            return parameter.holds_excerpt(tensor, excerpt.sources, part)
        return parameter.holds(tensor, part, name=name)

    def excerpt(self, name: str, dtype: torch.dtype) -> Excerpt | None:
        """The block of a unit of `dtype` that this rank reads; None if it has to come whole."""
        if not self.is_needed(name):
            return Excerpt(((0, 0),), ())
        if name in self._scales or not dtype.is_floating_point:
            return None
        return self._slot(name).excerpt

    def cut(self, name: str, full: torch.Tensor) -> torch.Tensor:
        """The excerpt of a full tensor: a view. The tensor itself if it has to come whole."""
        excerpt = self.excerpt(name, full.dtype)
        return full if excerpt is None else cut(full, excerpt)

    def live(self, name: str, dtype: torch.dtype) -> torch.Tensor | None:
        """The live weights that are an excerpt of `dtype`, element by element in one run."""
        return self._slot(name).live(dtype) if self.is_needed(name) else None

    def covered(self, names: Iterable[str]) -> set[str]:
        """The units that `names` are names of; of an encoded one, its own name is."""
        found = set(self._expanded(names) if self._fused else names)
        for alias, name in self._aliases.items():
            if alias in found:
                found.remove(alias)
                found.add(name)
        found = set(filter(self.is_needed, found))
        return found - self._scales.keys() if self._scales else found

    def missing(self, names: Iterable[str]) -> list[str]:
        """Units that do not come under any of `names`, in the model's order."""
        left = self._index.keys() - self.covered(names)
        return [name for name in self._index if name in left] if left else []

    def full_bytes(self) -> int:
        """Bytes of all full tensors in the dtypes that they are expected in."""
        return sum(
            math.prod(parameter.parts[part].full_shape) * parameter.value_dtype.itemsize
            for parameter, part in self._index.values()
        )

    def place(self, tensors: Mapping[str, torch.Tensor], excerpts: Set[str] = frozenset()) -> int:
        """Write this rank's elements of units, in place; return the bytes written. Scales are
        written with the encoded tensors that they are of, which are among `tensors` too.
        excerpts: those of `tensors` that are what this rank reads, and not full ones.

        Those that are runs of the bytes they become are copied by `copy_each`, others written
        by `ShardedParameter.place`. Shapes and dtypes were checked before, and they are detached.
        """
        num_bytes = 0
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        for name, tensor in tensors.items():
            if name in self._scales or not self.is_needed(name):
                continue
            slot = self._slot(name)
            num_bytes += slot.num_bytes
            is_excerpt = name in excerpts
            source = slot.same_elements(tensor) if is_excerpt else slot.same_bytes(tensor)
            if source is None and is_excerpt:
                self._place_excerpt(name, tensor)
            elif source is None:
                self._place(name, tensor, tensors)
            else:
                targets.append(slot.targets[0])
                sources.append(source)
        copy_each(targets, sources)
        return num_bytes

    def _place(self, name: str, tensor: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
        parameter, part = self.target(name)
        scales = self.other_half(name, tensor.dtype)
        if scales:
            parameter.place_encoded(tensor, tensors[scales], part, name=name)
        else:
            parameter.place(tensor, part, name=name)

    def _place_excerpt(self, name: str, tensor: torch.Tensor) -> None:
        parameter, part = self.target(name)
        excerpt = self._slot(name).excerpt
        assert excerpt is not None, f"{name} comes whole"
        parameter.place_excerpt(tensor, excerpt.sources, part)

    def _expanded(self, names: Iterable[str]) -> Iterator[str]:
        """The units of `names`, by their own names."""
        if not self._fused:
            return map(self.canonical, names)
        return (self.canonical(unit) for name in names for unit in self.units(name))

    def _slot(self, name: str) -> _Slot:
        slot = self._slots.get(name)
        if slot is None:
            slot = self._slots[name] = _Slot.of(*self.target(name))
        return slot
