"""What an engine should store of a trainer's weights, and whether it does: a push verified end to
end, whatever the engine's dtype, scheme and ranks.

The engine says which elements each rank stores and by which codec; the trainer encodes its own
tensors by the same codec (`kernels/quant`) and compares checksums of the stored bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from engine.errors import ChecksumMismatch, ManifestMismatch
from engine.protocol import CheckWeights, StoredTensor
from kernels.backend import KernelBackend
from kernels.checksum import checksum_into
from kernels.quant import codec_named
from trainer_bridge.adapters.base import WeightSource
from trainer_bridge.expert_names import name_in_model, parts_of
from trainer_bridge.update_target import UpdateTarget


def stored_checksums(
    tensors: Iterable[tuple[str, torch.Tensor]], layout: Mapping[str, StoredTensor]
) -> dict[str, int]:
    """The checksums that a rank of this layout has of these full tensors, by its names.

    tensors: in any float dtype, experts one by one or those of a layer together. layout: of
    `CheckWeights(action="layout")`. A tensor that it does not list, such as a second name of one,
    is left out. Waits for every device once.
    """
    listed = {name_in_model(name): name for name in layout}
    totals: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        for part, whole in (parts_of(name, tensor) or {name: tensor}).items():
            stored = listed.get(name_in_model(part))
            if stored is not None:
                totals[stored] = _total(whole, layout[stored])
    by_device: dict[torch.device, list[str]] = {}
    for name, total in totals.items():
        by_device.setdefault(total.device, []).append(name)
    found: dict[str, int] = {}
    for names in by_device.values():
        values = torch.cat([totals[name] for name in names]).tolist()
        found.update(zip(names, (value % (1 << 64) for value in values), strict=True))
    return found


def check_stored(source: WeightSource, target: UpdateTarget) -> None:
    """Raise ChecksumMismatch, naming a tensor and a rank, unless the engine stores what `source`
    holds now; ManifestMismatch for a tensor of the engine's that the source does not have.

    On a sharded trainer every rank calls this, as it iterates `source.tensors`, once a rank of the
    engine. The engine reads its weights once, between two steps.
    """
    layouts = target.send(CheckWeights(action="layout")).weights
    sums = target.send(CheckWeights()).weights
    for layout, held in zip(layouts, sums, strict=True):
        wanted = stored_checksums(source.tensors(), layout.layout)
        for name, checksum in held.checksums.items():
            if name not in wanted:
                raise ManifestMismatch(f"{name} is no tensor of the trainer", field=name)
            if wanted[name] != checksum:
                raise ChecksumMismatch(
                    f"rank {held.rank} stores {name} with checksum {checksum:#018x}; the "
                    f"trainer's weights give {wanted[name]:#018x}",
                    field=name,
                )


def _total(tensor: torch.Tensor, stored: StoredTensor) -> torch.Tensor:
    """The checksum, int64 [1] on the tensor's device."""
    codec = codec_named(stored.codec, getattr(torch, stored.dtype))
    total = torch.zeros(1, dtype=torch.int64, device=tensor.device)
    backend: KernelBackend = "triton" if tensor.is_cuda else "torch"
    start = 0
    for ranges in stored.pieces:
        for encoded in codec.encode(tensor.detach(), tuple(slice(*entry) for entry in ranges)):
            checksum_into(total, encoded, backend=backend, start=start)
            start += encoded.numel()
    return total
