"""What weights and KV pages are stored as: codecs, each one arithmetic in plain torch."""

from __future__ import annotations

import torch

from kernels.quant.codec import Codec, Index, Plain
from kernels.quant.codec_int8 import Int8Rows

__all__ = ["Codec", "Index", "Int8Rows", "Plain", "codec_named"]


def codec_named(name: str, dtype: torch.dtype) -> Codec:
    """The codec that says so of itself; dtype: of the first storage.

    Raises ValueError, with the names there are, for another.
    """
    if name == Plain.name:
        return Plain(dtype)
    if name == Int8Rows.name:
        return Int8Rows()
    raise ValueError(f"no codec is called {name!r}: there are 'plain' and 'int8'")
