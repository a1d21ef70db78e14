"""A parameter that knows which full tensors it holds slices of, and places them itself.

A merged parameter (q, k and v in one matrix; gate and up in one matrix) has several
`Part`s; a plain one has a single part under the key "". Placing writes into the storage
that exists, so `data_ptr` never changes and captured graphs stay valid. That every
parameter carries its own loader follows nano-vllm (GeeeekExplorer/nano-vllm).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from engine.errors import ManifestMismatch, ModelError
from engine.parallel.mesh import Mesh
from kernels.torch_compat import parameter_of

SINGLE = ""
"""Part key of a parameter that holds slices of one tensor only."""


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
class Part:
    """A slice of one full tensor, and where it sits in the parameter.

    full_shape: shape of the full tensor, as its Hugging Face name has it.
    dim: the dim that is both sliced in the full tensor and stacked in the parameter.
    shard: elements of the full tensor along `dim` that this rank holds.
    start: first element of the parameter along `dim` that they occupy.
    """

    full_shape: tuple[int, ...]
    dim: int
    shard: Shard
    start: int = 0


def whole(shape: tuple[int, ...]) -> dict[str, Part]:
    """Parts of a parameter that every rank holds completely."""
    return {SINGLE: Part(full_shape=shape, dim=0, shard=Shard(0, shape[0]))}


def sliced(shape: tuple[int, ...], dim: int, shard: Shard) -> dict[str, Part]:
    """Parts of a parameter that is `shard` of one full tensor of `shape`."""
    return {SINGLE: Part(full_shape=shape, dim=dim, shard=shard)}


class ShardedParameter(torch.nn.Parameter):
    """This rank's slices of one or more full tensors, in one storage. Takes no gradient.

    parts: by key; a key other than "" stands for the sibling module of that name, so part
        "q_proj" of `self_attn.qkv_proj.weight` is `self_attn.q_proj.weight`.
    """

    parts: Mapping[str, Part]

    def __new__(cls, data: torch.Tensor, parts: Mapping[str, Part]) -> ShardedParameter:
        parameter = parameter_of(cls, data)
        parameter.parts = dict(parts)
        return parameter

    def __init__(self, data: torch.Tensor, parts: Mapping[str, Part]) -> None:
        """Everything is set in `__new__`, as tensor subclasses require."""

    def __deepcopy__(self, memo: dict[int, object]) -> ShardedParameter:
        copy = ShardedParameter(self.detach().clone(), self.parts)
        memo[id(self)] = copy
        return copy

    def check(self, shape: tuple[int, ...], part: str = SINGLE, *, name: str = "") -> None:
        """Raise ManifestMismatch, naming `name`, unless `shape` is that of the full tensor."""
        expected = self.parts[part].full_shape
        if tuple(shape) != expected:
            label = name or part or "tensor"
            raise ManifestMismatch(
                f"{label} has shape {list(shape)}, the model expects {list(expected)}",
                field=label,
            )

    def view_of(self, part: str = SINGLE) -> torch.Tensor:
        """The storage of one part: a view of this parameter."""
        piece = self.parts[part]
        return self.detach().narrow(piece.dim, piece.start, piece.shard.length)

    def slice_of(self, full: torch.Tensor, part: str = SINGLE, *, name: str = "") -> torch.Tensor:
        """The elements of `full` that this rank holds: a view of `full`."""
        self.check(tuple(full.shape), part, name=name)
        piece = self.parts[part]
        return full.detach().narrow(piece.dim, piece.shard.start, piece.shard.length)

    def place(self, full: torch.Tensor, part: str = SINGLE, *, name: str = "") -> int:
        """Write this rank's slice of a full tensor, in place; return the bytes written.

        full: floating point, any dtype and device; converted to this parameter's.
        name: Hugging Face name, for the error.
        Raises ManifestMismatch for a wrong shape or an integer dtype; nothing is written.
        """
        if not full.is_floating_point():
            label = name or part or "tensor"
            raise ManifestMismatch(f"{label} has dtype {full.dtype}, not a float", field=label)
        target = self.view_of(part)
        target.copy_(self.slice_of(full, part, name=name))
        return target.numel() * target.element_size()

    def holds(self, full: torch.Tensor, part: str = SINGLE, *, name: str = "") -> bool:
        """Whether placing `full` would change nothing."""
        mine = self.view_of(part)
        return torch.equal(mine, self.slice_of(full, part, name=name).to(mine))
