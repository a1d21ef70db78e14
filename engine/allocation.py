"""Building a model so that its weights can be released and everything else stays.

What is not a parameter (rotary tables, buffers) comes with no update, so it must not be lost when
the weights are released: it moves out of their region.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import nn

from engine.layers.runtime import LayerRuntime
from engine.memory import require_room
from engine.models.build import Model, build_model
from engine.models.config import ModelConfig
from engine.occupancy import Occupancy

_GRANULE = 512
"""torch's allocator rounds sizes up to this."""


def allocate_model(
    config: ModelConfig, *, runtime: LayerRuntime, max_position: int, occupancy: Occupancy
) -> Model:
    """`build_model`, with the parameters in the region "weights".

    Raises OutOfMemory, with numbers, when the weights do not fit on a GPU.
    """
    num_bytes = 0
    if runtime.device.type == "cuda":
        num_bytes = _measure(config, runtime, max_position)
        require_room(num_bytes, runtime.device)
    with occupancy.region("weights", num_bytes=num_bytes):
        model = build_model(config, runtime=runtime, max_position=max_position)
    for tensor in other_tensors(model):
        tensor.data = tensor.data.clone()
    occupancy.hold("weights", model.parameters())
    return model


def other_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Tensors of the modules, and of the layer objects they hold, that are no parameters."""
    found = {
        id(tensor): tensor
        for module in model.modules()
        for value in vars(module).values()
        for tensor in _tensors_in(value)
    }
    return list(found.values())


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of the parameters on this rank, tied ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def _measure(config: ModelConfig, runtime: LayerRuntime, max_position: int) -> int:
    """Bytes that building the model allocates, found by building it without memory."""
    nowhere = dataclasses.replace(runtime, device=torch.device("meta"))
    model = build_model(config, runtime=nowhere, max_position=max_position)
    sizes = [tensor.nbytes for tensor in (*model.parameters(), *other_tensors(model))]
    return sum(-(-size // _GRANULE) * _GRANULE for size in sizes)


def _tensors_in(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if not isinstance(value, nn.Parameter):
            yield value
    elif isinstance(value, dict):
        for entry in value.values():
            if isinstance(entry, torch.Tensor):
                yield from _tensors_in(entry)
    elif not isinstance(value, nn.Module) and type(value).__module__.startswith("engine.layers"):
        for entry in getattr(value, "__dict__", {}).values():
            yield from _tensors_in(entry)


def num_parameters(model: Model) -> int:
    """Elements of the full tensors, whatever share of them this rank holds."""
    index = model.weight_index().values()
    return sum(math.prod(parameter.parts[key].full_shape) for parameter, key in index)
