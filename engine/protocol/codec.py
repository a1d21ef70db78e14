"""MessagePack bytes of any message.

Arrays are numpy and travel as (dtype, shape, bytes).
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, np.ascontiguousarray(value).tobytes())
    raise TypeError(f"cannot encode {type(value).__name__}")


def _decode_array(kind: type, value: Any) -> Any:
    origin = getattr(kind, "__origin__", kind)
    if origin is np.ndarray:
        dtype, shape, data = value
        return np.frombuffer(data, dtype=np.dtype(dtype)).reshape(shape)
    raise TypeError(f"cannot decode {kind}")


def encode(message: Any) -> bytes:
    """MessagePack bytes of any struct of this module."""
    return msgspec.msgpack.encode(message, enc_hook=_encode_array)


def decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    """What decodes many messages of `kind` as `decode` does: a type that is no struct takes longer
    to look at than a message to read."""
    return msgspec.msgpack.Decoder(kind, dec_hook=_decode_array)


def decode(data: bytes, kind: Any) -> Any:
    """Inverse of `encode`; `kind` is the struct or union expected. Arrays are read-only."""
    return msgspec.msgpack.decode(data, type=kind, dec_hook=_decode_array)
