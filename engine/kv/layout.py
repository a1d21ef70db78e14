"""What the layers of a model keep of each token in the KV pool.

Legend: N pages, G tokens of a page, K kv heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch

from engine.config import KVDType
from engine.layers.kinds import AttentionKind
from engine.layers.parameter import kv_head_shard
from engine.parallel.mesh import Mesh
from kernels.quant import fp8_kv


@dataclass(frozen=True, kw_only=True)
class PagePart:
    """One tensor of a layer's pages, [N, G, ...] or [N, ..., G].

    name: says which within the layout. shape: what one token keeps of it. tokens_last: the tokens
    of a page lie next to each other, as suits parts of which a token keeps few bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    tokens_last: bool = False

    def page_shape(self, page_size: int) -> tuple[int, ...]:
        """Of one page of `page_size` tokens."""
        return (*self.shape, page_size) if self.tokens_last else (page_size, *self.shape)

    @property
    def token_bytes(self) -> int:
        """Bytes that a token takes of it."""
        return math.prod(self.shape) * self.dtype.itemsize


class KVLayout(Protocol):
    """What a layer keeps of a token.

    Frozen and comparable: layers with equal parts form a group, whose tensors the pool allocates
    together. Back ends of attention know the layouts that they serve by their class.
    """

    @property
    def parts(self) -> tuple[PagePart, ...]:
        """The tensors of a layer, in the order in which `KVPool.layer` gives them."""
        ...

    @property
    def window(self) -> int | None:
        """How many positions a query of the layer sees, its own the last of them; None for all."""
        ...


@dataclass(frozen=True, kw_only=True)
class HeadLayout:
    """Keys and values of every kv head of this rank: [N, G, K, D] each.

    dtype: of what the layers compute. scaled: kept as e4m3 codes, with a bfloat16 scale for each
    token and head, [N, K, G] for keys and for values (`kernels.quant.fp8_kv`); else as computed.
    """

    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    scaled: bool = False
    window: int | None = None

    @property
    def parts(self) -> tuple[PagePart, ...]:
        """See `KVLayout`: keys and values, then their scales if they have some."""
        heads, dtype = self.num_kv_heads, fp8_kv.CODE if self.scaled else self.dtype
        dims = {"k": self.key_dim, "v": self.value_dim}
        parts = [PagePart(name=k, shape=(heads, dim), dtype=dtype) for k, dim in dims.items()]
        if self.scaled:
            parts += [
                PagePart(name=f"{k}_scale", shape=(heads,), dtype=fp8_kv.SCALE, tokens_last=True)
                for k in dims
            ]
        return tuple(parts)


class HeadPages(NamedTuple):
    """The pages of a layer that has a `HeadLayout`."""

    k_NGKD: torch.Tensor
    v_NGKD: torch.Tensor
    scales: fp8_kv.KVScales | None


def head_pages(tensors: Sequence[torch.Tensor]) -> HeadPages:
    """What `KVPool.layer` gives of such a layer, by name."""
    k_NGKD, v_NGKD, *scales = tensors
    return HeadPages(k_NGKD, v_NGKD, fp8_kv.KVScales(*scales) if scales else None)


def page_bytes(layouts: Iterable[KVLayout], page_size: int) -> int:
    """Bytes of one page over all layers."""
    return page_size * sum(part.token_bytes for layout in layouts for part in layout.parts)


def head_layouts(
    kinds: Sequence[AttentionKind], *, dtype: torch.dtype, kv_dtype: KVDType, mesh: Mesh
) -> tuple[HeadLayout, ...]:
    """Of the layers of a model on one rank, in order; a worker asks once. dtype: of the model."""
    return tuple(
        HeadLayout(
            num_kv_heads=kv_head_shard(kind.num_kv_heads, mesh).length,
            key_dim=kind.head_dim,
            value_dim=kind.head_dim,
            dtype=dtype,
            scaled=kv_dtype == "fp8_e4m3",
            window=kind.window,
        )
        for kind in kinds
    )


def common_heads(layouts: Sequence[KVLayout]) -> HeadLayout:
    """The layout that all layers have but for their windows: what back ends are built for that
    serve heads of one shape. Its `window` says nothing."""
    first = layouts[0]
    assert isinstance(first, HeadLayout), "these kernels read keys and values of heads"
    first = replace(first, window=None)
    assert all(
        isinstance(layout, HeadLayout) and replace(layout, window=None) == first
        for layout in layouts
    ), "these kernels serve heads of one shape"
    assert first.key_dim == first.value_dim, "these kernels serve keys as wide as values"
    return first
