"""Bodies of vLLM's weight transfer, which two of its routes share."""

from __future__ import annotations

import msgspec

from engine.protocol.types import Int64, Label, Names, PositiveSize, Seconds, Shapes

CHUNK_BYTES = 1 << 30


class Start(msgspec.Struct):
    """partial, which is not vLLM's: the finish commits what came, whatever that is."""

    is_checkpoint_format: bool = True
    partial: bool = True


class UpdateInfo(msgspec.Struct):
    """Tensors that will come, in order; empty names stand for those announced last. packed: as
    a stream of chunks; null as the group was made. timeout_s is not vLLM's."""

    names: Names = []
    dtype_names: Names = []
    shapes: Shapes = []
    packed: bool | None = None
    packed_buffer_size_bytes: PositiveSize = CHUNK_BYTES
    timeout_s: Seconds = 300.0


class Finish(msgspec.Struct):
    """weight_version: what the weights are called from now on."""

    weight_version: Label | Int64 | None = None
