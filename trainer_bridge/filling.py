"""A transformers model takes in the tensors of a checkpoint, each element once.

Experts come one by one, as files have them, or those of a layer together, as the model has them; a
model may come partly in one form and partly in the other.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from engine.errors import CheckpointError
from trainer_bridge.adapters.buffers import is_sent_buffer
from trainer_bridge.expert_names import name_in_model, parts_of


@torch.no_grad()
def fill(model: torch.nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy named tensors into the parameters of a model, and into the buffers that travel with
    them, which become float32 whatever the model is.

    Raises CheckpointError, naming the tensor, for one that is unknown, missing, misshapen or no
    float, that comes twice, also as a part of another, or unlike the other name of a tied one.
    """
    filling = _Filling(model)
    for name, tensor in tensors:
        filling.take(name, tensor)
    filling.require_all()


class _Filling:
    """What of a model is filled. A part is what one name of a file fills of a fused tensor."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._targets: dict[str, torch.Tensor] = dict(
            model.named_parameters(remove_duplicate=False)
        )
        for name, buffer in model.named_buffers():
            if is_sent_buffer(name):
                buffer.data = buffer.data.float()
                self._targets[name] = buffer
        self._parts: dict[str, dict[str, torch.Tensor]] = {
            name: parts for name in self._targets if (parts := parts_of(name, self._targets[name]))
        }
        self._whole_of = {part: name for name, parts in self._parts.items() for part in parts}
        self._came: set[str] = set()
        self._filled: dict[int, str] = {}

    def take(self, name: str, tensor: torch.Tensor) -> None:
        """Copy one tensor to where it belongs."""
        if name in self._came:
            raise CheckpointError(f"{name!r} came twice", field=name)
        self._came.add(name)
        known = name_in_model(name)
        if known in self._whole_of:
            self._take_part(known, name, tensor)
            return
        target = self._targets.get(known)
        if target is None:
            raise CheckpointError(f"the model has no tensor {name!r}", field=name)
        _require_fit(name, tensor, target)
        for part in self._parts.get(known, ()):
            self._claim(part, name)
        twin = self._filled.setdefault(id(target), name)
        if twin == name:
            target.copy_(tensor)
        elif not torch.equal(target, tensor.to(target)):
            raise CheckpointError(f"{name!r} differs from {twin!r}: the two are tied", field=name)

    def _take_part(self, part: str, name: str, tensor: torch.Tensor) -> None:
        target = self._parts[self._whole_of[part]][part]
        _require_fit(name, tensor, target)
        self._claim(part, name)
        target.copy_(tensor)

    def _claim(self, part: str, name: str) -> None:
        """Note which tensor a part came in. A part has no other use for `_filled`: it is a view
        of its own."""
        other = self._filled.setdefault(id(self._parts[self._whole_of[part]][part]), name)
        if other != name:
            raise CheckpointError(
                f"{name!r} came beside {other!r}: one holds what the other is a part of, or both "
                "are the same; give experts one by one or together",
                field=name,
            )

    def require_all(self) -> None:
        """Raise CheckpointError, naming one, for tensors that did not come."""
        missing = [
            label
            for name, target in self._targets.items()
            for label, place in self._parts.get(name, {name: target}).items()
            if id(place) not in self._filled
        ]
        if missing:
            raise CheckpointError(
                f"no tensor for {missing[0]!r} ({len(missing)} missing)", field=missing[0]
            )


def _require_fit(name: str, tensor: torch.Tensor, target: torch.Tensor) -> None:
    if target.shape != tensor.shape:
        raise CheckpointError(
            f"{name!r} has shape {list(tensor.shape)}, the model {list(target.shape)}",
            field=name,
        )
    if not tensor.is_floating_point():
        raise CheckpointError(f"{name!r} has dtype {tensor.dtype}, not a float", field=name)
