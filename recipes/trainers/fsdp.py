"""FSDP2 (`fully_shard`) as a back end of the sharded trainer (arXiv 2304.11277)."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from recipes.trainers.loss_scale import LossScale, loss_scale_of
from recipes.trainers.memory import recompute_layers
from recipes.trainers.optimizer_options import OptimizerOptions
from recipes.trainers.reference import Reference
from recipes.trainers.sharded import write_hf_config
from trainer_bridge.adapters.base import WeightSource
from trainer_bridge.adapters.fsdp import FsdpSource

FOLDER = "fsdp"


class FsdpBackend:
    """A `Backend` over all processes of the default group; parameters stay float32 shards.

    dtype: bfloat16 and float16 gather and compute in it, and reduce gradients in float32.
    reference: the model with its initial weights, where there is a KL term; its shards are in host
    memory between its passes if `reference_on_host`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        options: OptimizerOptions,
        *,
        num_processes: int,
        device: torch.device,
        dtype: torch.dtype,
        reference: PreTrainedModel | None = None,
        reference_on_host: bool = False,
    ) -> None:
        mesh = init_device_mesh(device.type, (num_processes,))
        model = model.float().eval()
        model.set_attn_implementation("sdpa")
        if options.gradient_checkpointing:
            recompute_layers(model)
        self.model: Any = _shard(model, mesh, dtype)
        self.reference: Reference | None = None
        if reference is not None:
            reference = reference.float().eval().requires_grad_(False)
            reference.set_attn_implementation("sdpa")
            offload = CPUOffloadPolicy() if reference_on_host and device.type == "cuda" else None
            self.reference = nullcontext(_shard(reference, mesh, dtype, offload))
        self.weights: WeightSource = FsdpSource(self.model, dtype=dtype)
        self.loss_scale: LossScale | None = loss_scale_of(dtype)
        self._max_grad_norm = options.max_grad_norm
        self._optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
        )

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """See `Backend`."""
        if self.loss_scale is not None:
            loss = loss * self.loss_scale.value
        loss.backward()

    def step(self, lr: float) -> float:
        """See `Backend`."""
        self._unscale()
        clipped = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._max_grad_norm)
        # Summed over all processes, so that NaN or inf of one shard is seen by each of them.
        norm = float(clipped.full_tensor() if isinstance(clipped, DTensor) else clipped)
        if self.loss_scale is not None and not self.loss_scale.accept(norm):
            self._optimizer.zero_grad(set_to_none=True)
            return 0.0
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _unscale(self) -> None:
        """Divide the float32 gradients by the scale of their loss."""
        if self.loss_scale is not None:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad *= 1.0 / self.loss_scale.value

    def save(self, folder: Path) -> None:
        """See `Backend`. May be loaded by any number of processes."""
        state_dict_saver.save(self._state(), checkpoint_id=folder / FOLDER)

    def load(self, folder: Path) -> None:
        """See `Backend`."""
        state = self._state()
        state_dict_loader.load(state, checkpoint_id=folder / FOLDER)
        set_state_dict(
            self.model,
            self._optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        if self.loss_scale is not None:
            self.loss_scale.load(state["loss_scale"])

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self._optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        if self.loss_scale is not None:
            state["loss_scale"] = self.loss_scale.state()
        return state

    def write_config(self, folder: Path, dtype: torch.dtype) -> None:
        """See `Backend`."""
        write_hf_config(self.model, folder, dtype)


def _shard(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    offload: OffloadPolicy | None = None,
) -> Any:
    """One group a decoder layer, and one for the rest.

    The root is resharded after its forward pass as well: a step between that and the next
    would otherwise not be seen.
    """
    policy, offload = MixedPrecisionPolicy(), offload or OffloadPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    layers = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload)
    return fully_shard(
        model, mesh=mesh, mp_policy=policy, reshard_after_forward=True, offload_policy=offload
    )
