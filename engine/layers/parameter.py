"""A parameter that knows which full tensors it holds elements of, and places them itself.

A merged parameter (q, k and v in one matrix; gate and up in one matrix; the experts of a layer)
has several `Part`s; a plain one has a single part under the key "". Placing writes into the
storages that exist, so `data_ptr` never changes and captured graphs stay valid. That every
parameter carries its own loader follows nano-vllm (GeeeekExplorer/nano-vllm).

What the elements are stored as is the codec's business (`kernels/quant`): nothing here or in
`engine/weights` takes stored bytes for those that came.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from engine.errors import ManifestMismatch, ModelError
from engine.parallel.mesh import Mesh
from kernels.quant import Codec, Index, Plain
from kernels.torch_compat import parameter_of

SINGLE = ""
"""Part key of a parameter that holds elements of one tensor only."""


@dataclass(frozen=True)
class Shard:
    """Elements [start, start + length) of one dim of a full tensor: those of one rank."""

    start: int
    length: int


def even_shard(size: int, mesh: Mesh, what: str) -> Shard:
    """This rank's equal share of `size` elements.

    Raises ModelError, naming `what`, when the ranks do not divide it.
    """
    if size % mesh.tp_size:
        raise ModelError(f"{what} is {size}: {mesh.tp_size} ranks do not divide it", field=what)
    length = size // mesh.tp_size
    return Shard(mesh.tp_rank * length, length)


def kv_head_shard(num_kv_heads: int, mesh: Mesh) -> Shard:
    """This rank's KV heads; with more ranks than heads, neighbouring ranks share one.

    Raises ModelError, naming `num_key_value_heads`, when neither number divides the other.
    """
    if num_kv_heads >= mesh.tp_size:
        return even_shard(num_kv_heads, mesh, "num_key_value_heads")
    if mesh.tp_size % num_kv_heads:
        raise ModelError(
            f"num_key_value_heads is {num_kv_heads}: it does not divide {mesh.tp_size} ranks",
            field="num_key_value_heads",
        )
    return Shard(mesh.tp_rank * num_kv_heads // mesh.tp_size, 1)


def uneven_shard(size: int, mesh: Mesh) -> Shard:
    """This rank's share of `size` elements, the last ranks taking what is left."""
    per_rank = -(-size // mesh.tp_size)
    start = min(mesh.tp_rank * per_rank, size)
    return Shard(start, min(per_rank, size - start))


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Elements of a full tensor that this rank holds, and where.

    source: indexes the full tensor. target: indexes the storage; what both give has one shape.
    """

    source: Index
    target: Index


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a parameter holds of one full tensor.

    full_shape: shape of the full tensor, as its Hugging Face name has it.
    pieces: none where other ranks hold all of it, such as an expert of theirs; several where it
        lies in places apart, or more than once, such as an expert that is replicated.
    """

    full_shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True)
class Fused:
    """A full tensor that is the tensors of several parts, one behind the other: the flat elements
    of the first, then those of the second, and so on.

    shape: of the full tensor. keys: of the parts, in order.
    """

    shape: tuple[int, ...]
    keys: tuple[str, ...]


def stacked(shape: tuple[int, ...], dim: int, shard: Shard, start: int = 0) -> Part:
    """The part of a parameter that holds `shard` along `dim` of a full tensor, from element
    `start` of its own `dim` on."""

    def along(first: int) -> Index:
        index: list[slice | int] = [slice(0, size) for size in shape]
        index[dim] = slice(first, first + shard.length)
        return tuple(index)

    return Part(full_shape=shape, pieces=(Piece(source=along(shard.start), target=along(start)),))


def whole(shape: tuple[int, ...]) -> dict[str, Part]:
    """Parts of a parameter that every rank holds completely."""
    return {SINGLE: stacked(shape, 0, Shard(0, shape[0]))}


def sliced(shape: tuple[int, ...], dim: int, shard: Shard) -> dict[str, Part]:
    """Parts of a parameter that is `shard` of one full tensor of `shape`."""
    return {SINGLE: stacked(shape, dim, shard)}


class ShardedParameter(torch.nn.Parameter):
    """This rank's elements of one or more full tensors. Takes no gradient.

    parts: by key; a key other than "" stands for the sibling module of that name, so part
        "q_proj" of `self_attn.qkv_proj.weight` is `self_attn.q_proj.weight`.
    codec: what the elements are stored as; by default as they are. companions: what it stores
        beside this tensor, such as scales: parameters of the same module.
    fused: by leaf name beside the parameter's module, tensors that may come in place of those of
        several parts.
    value_dtype: the dtype in which full tensors are expected; any float dtype may come.
    """

    parts: Mapping[str, Part]
    codec: Codec
    companions: tuple[torch.nn.Parameter, ...]
    fused: Mapping[str, Fused]
    value_dtype: torch.dtype

    def __new__(
        cls,
        data: torch.Tensor,
        parts: Mapping[str, Part],
        *,
        codec: Codec | None = None,
        companions: Sequence[torch.nn.Parameter] = (),
        fused: Mapping[str, Fused] | None = None,
        value_dtype: torch.dtype | None = None,
    ) -> ShardedParameter:
        parameter = parameter_of(cls, data)
        parameter.parts = dict(parts)
        parameter.codec = codec or Plain(data.dtype)
        parameter.companions = tuple(companions)
        parameter.fused = dict(fused or {})
        parameter.value_dtype = value_dtype or data.dtype
        return parameter

    def __init__(
        self,
        data: torch.Tensor,
        parts: Mapping[str, Part],
        *,
        codec: Codec | None = None,
        companions: Sequence[torch.nn.Parameter] = (),
        fused: Mapping[str, Fused] | None = None,
        value_dtype: torch.dtype | None = None,
    ) -> None:
        """Everything is set in `__new__`, as tensor subclasses require."""

    def __deepcopy__(self, memo: dict[int, object]) -> ShardedParameter:
        twin = ShardedParameter(
            self.detach().clone(),
            self.parts,
            codec=self.codec,
            companions=copy.deepcopy(self.companions, memo),
            fused=self.fused,
            value_dtype=self.value_dtype,
        )
        memo[id(self)] = twin
        return twin

    @property
    def storages(self) -> tuple[torch.Tensor, ...]:
        """All that is stored: this tensor, then its companions."""
        return (self.detach(), *(companion.detach() for companion in self.companions))

    def check(self, shape: tuple[int, ...], part: str = SINGLE, *, name: str = "") -> None:
        """Raise ManifestMismatch, naming `name`, unless `shape` is that of the full tensor."""
        expected = self.parts[part].full_shape
        if tuple(shape) != expected:
            label = name or part or "tensor"
            raise ManifestMismatch(
                f"{label} has shape {list(shape)}, the model expects {list(expected)}",
                field=label,
            )

    def stored(self, part: str = SINGLE) -> Iterator[tuple[Piece, tuple[torch.Tensor, ...]]]:
        """Each piece of a part, and what is stored for it: views of the storages."""
        for piece in self.parts[part].pieces:
            yield piece, self.codec.views(self.storages, piece.target)

    def views(self, part: str = SINGLE) -> list[torch.Tensor]:
        """All that is stored for a part: views of the storages."""
        return [view for _, views in self.stored(part) for view in views]

    def decoded(self, part: str = SINGLE, rows: int = 1 << 62) -> torch.Tensor | None:
        """This rank's values of the first piece of a part, as floats, the first `rows` of them;
        None where it holds nothing of it."""
        for _, views in self.stored(part):
            return self.codec.decode(views, rows)
        return None

    def place(self, full: torch.Tensor, part: str = SINGLE, *, name: str = "") -> int:
        """Write this rank's elements of a full tensor, in place; return the bytes written.

        full: floating point, any dtype and device; stored as the codec says.
        name: Hugging Face name, for the error.
        Raises ManifestMismatch for a wrong shape or an integer dtype; nothing is written.
        """
        if not full.is_floating_point():
            label = name or part or "tensor"
            raise ManifestMismatch(f"{label} has dtype {full.dtype}, not a float", field=label)
        self.check(tuple(full.shape), part, name=name)
        num_bytes = 0
        for piece, targets in self.stored(part):
            self.codec.write(targets, full.detach(), piece.source)
            num_bytes += sum(target.nbytes for target in targets)
        return num_bytes

    def place_excerpt(
        self, excerpt: torch.Tensor, sources: Sequence[Index], part: str = SINGLE
    ) -> None:
        """`place` from the elements of the full tensor that are read for it, alone: `sources`
        index them, one for each piece of the part."""
        for (_, targets), source in zip(self.stored(part), sources, strict=True):
            self.codec.write(targets, excerpt, source)

    def place_encoded(
        self, full: torch.Tensor, scales: torch.Tensor, part: str = SINGLE, *, name: str = ""
    ) -> int:
        """`place` a full tensor that is encoded already, by the scales that came beside it."""
        self.check(tuple(full.shape), part, name=name)
        num_bytes = 0
        for piece, targets in self.stored(part):
            self.codec.write_encoded(targets, full.detach(), scales.detach(), piece.source)
            num_bytes += sum(target.nbytes for target in targets)
        return num_bytes

    def holds(self, full: torch.Tensor, part: str = SINGLE, *, name: str = "") -> bool:
        """Whether placing `full` would change nothing."""
        self.check(tuple(full.shape), part, name=name)
        return self.holds_excerpt(full, [piece.source for piece in self.parts[part].pieces], part)

    def holds_excerpt(
        self, excerpt: torch.Tensor, sources: Sequence[Index], part: str = SINGLE
    ) -> bool:
        """Whether `place_excerpt` would change nothing."""
        return all(
            torch.equal(mine, new.to(mine.device))
            for (_, views), source in zip(self.stored(part), sources, strict=True)
            for mine, new in zip(views, self.codec.encode(excerpt.detach(), source), strict=True)
        )
