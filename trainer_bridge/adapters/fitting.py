"""The source that fits a trainer's model."""

from __future__ import annotations

import torch

from trainer_bridge.adapters.base import WeightSource


def source_of(
    model: torch.nn.Module, *, dtype: torch.dtype | None = None, bucket_bytes: int = 256 << 20
) -> WeightSource:
    """A `WeightSource` over a plain module, a DeepSpeedEngine or an FSDP2 module.

    dtype: of the tensors on the wire; None sends them as they are. A plain module that several
    trainer ranks hold whole wants a `PlainSource` with its rank instead.
    """
    from torch.distributed.tensor import DTensor

    from trainer_bridge.adapters.deepspeed import DeepSpeedSource
    from trainer_bridge.adapters.fsdp import FsdpSource
    from trainer_bridge.adapters.plain import PlainSource

    parameters = list(model.parameters())
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        return FsdpSource(model, dtype=dtype, bucket_bytes=bucket_bytes)
    by_deepspeed = any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__)
    if by_deepspeed or any(hasattr(p, "ds_id") for p in parameters):
        return DeepSpeedSource(model, dtype=dtype, bucket_bytes=bucket_bytes)
    return PlainSource(model, dtype=dtype)
