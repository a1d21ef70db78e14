"""DeepSpeed's ZeRO as a back end of the sharded trainer (arXiv 1910.02054)."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from engine.errors import InvalidRequest
from recipes.trainers.loss_scale import (
    FIRST_POWER,
    GROWTH_INTERVAL,
    LEAST,
    LossScale,
    require_smaller,
)
from recipes.trainers.memory import recompute_layers
from recipes.trainers.optimizer_options import OptimizerOptions
from recipes.trainers.reference import Reference, reference_of
from recipes.trainers.sharded import write_hf_config
from trainer_bridge.adapters.base import WeightSource
from trainer_bridge.adapters.buffers import keep_buffers, restore_buffers
from trainer_bridge.adapters.deepspeed import DeepSpeedSource

logger = logging.getLogger(__name__)

TAG = "deepspeed"
NEVER = 1 << 62


class DeepSpeedBackend:
    """A `Backend`. The default process group must be there.

    stage: 0 (plain data parallel), 1 (optimizer state sharded), 2 (gradients too), 3
    (parameters too). dtype: bfloat16 and float16 compute in it, with float32 masters inside the
    optimizer, which start from the model's own float32 weights; stage 0 is then run as stage 1,
    the first that has such masters. In float16 DeepSpeed scales the loss, and skips steps.
    reference: the model with its initial weights, for a KL term, in host memory between its passes
    if `reference_on_host`. Raises InvalidRequest, with how to install it, when DeepSpeed is
    missing, and for a device that it has no float16 for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        options: OptimizerOptions,
        *,
        stage: int,
        device: torch.device,
        dtype: torch.dtype,
        reference: PreTrainedModel | None = None,
        reference_on_host: bool = False,
    ) -> None:
        library = _import(device)
        if dtype == torch.float16:
            _require_float16(library, device)
        if stage == 0 and dtype != torch.float32:
            logger.info("ZeRO stage 0 in 16 bits runs as stage 1: float32 masters begin there")
            stage = 1
        model = model.float().eval()
        # DeepSpeed makes its masters from the parameters once they are rounded.
        full = {} if dtype == torch.float32 else _full_precision(model)
        model.set_attn_implementation("sdpa")
        config = _config(options, stage, dtype)
        if options.gradient_checkpointing:
            recompute_layers(model)
        kept = keep_buffers(model)
        engine, *_ = library.initialize(
            model=model, model_parameters=list(model.parameters()), config=config
        )
        restore_buffers(model, kept)
        _set_masters(engine.module, full, device)
        self.model: Any = engine
        self._scales = dtype == torch.float16
        if self._scales:
            # Its own error there has no type and says less than ours.
            engine.optimizer.loss_scaler.raise_error_at_min_scale = False
        self.reference: Reference | None = None
        if reference is not None:
            reference = reference.float().eval().requires_grad_(False)
            reference.set_attn_implementation("sdpa")
            if stage < 3:
                frozen = _frozen(reference, dtype)
                self.reference = reference_of(frozen, device, on_host=reference_on_host)
            else:
                offloads = reference_on_host and device.type == "cuda"
                self.reference = nullcontext(_sharded(library, reference, config, offloads))
        self.weights: WeightSource = DeepSpeedSource(engine)
        self._stage = stage

    @property
    def loss_scale(self) -> LossScale | None:
        """See `Backend`: DeepSpeed's own, read."""
        if not self._scales:
            return None
        value = float(self.model.optimizer.loss_scale)
        return LossScale(value=value, skipped=self.model.skipped_steps)

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """See `Backend`."""
        self.model.set_gradient_accumulation_boundary(is_last)
        self.model.backward(loss)

    def step(self, lr: float) -> float:
        """See `Backend`."""
        for group in self.model.optimizer.param_groups:
            group["lr"] = lr
        # Without ZeRO and in float32, DeepSpeed clips but does not tell the norm.
        own_norm = _norm(self.model.module.parameters()) if self._stage == 0 else 0.0
        before = self.loss_scale
        self.model.step()
        if before is not None and self.model.skipped_steps > before.skipped:
            require_smaller(before.value)
            return 0.0
        norm = self.model.get_global_grad_norm()
        return own_norm if norm is None else float(norm)

    def save(self, folder: Path) -> None:
        """See `Backend`. Each process writes its shards; the number of processes is fixed."""
        self.model.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """See `Backend`. Raises InvalidRequest for the shards of another number of processes."""
        num, size = len(list((folder / TAG).glob("*optim_states.pt"))), dist.get_world_size()
        if num not in (0, size):
            raise InvalidRequest(
                f"resume: the run had {num} trainer processes and has {size} now; start it with "
                f"--nproc-per-node {num}",
                field="resume",
            )
        self.model.load_checkpoint(str(folder), tag=TAG)

    def write_config(self, folder: Path, dtype: torch.dtype) -> None:
        """See `Backend`."""
        write_hf_config(self.model.module, folder, dtype)


def _import(device: torch.device) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        library: Any = importlib.import_module("deepspeed")
    except ImportError as error:
        raise InvalidRequest(
            f"trainer: deepspeed cannot be imported ({error}); pip install 'slipstream[train]', "
            "or use --trainer fsdp",
            field="trainer",
        ) from error
    # Its CPU collectives through shared memory are compiled for a minute at their first use,
    # and wait without a deadline for a rank that is gone; gloo does neither.
    library.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return library


def _require_float16(library: Any, device: torch.device) -> None:
    if not library.accelerator.get_accelerator().is_fp16_supported():
        raise InvalidRequest(
            f"dtype: DeepSpeed has no float16 for this {device.type}; use --trainer fsdp or plain, "
            "or --dtype bfloat16",
            field="dtype",
        )


def _config(options: OptimizerOptions, stage: int, dtype: torch.dtype) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": options.max_grad_norm,
        "zero_optimization": {"stage": stage},
        "steps_per_print": NEVER,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": options.lr,
                "betas": [options.beta1, options.beta2],
                "eps": 1e-8,
                "weight_decay": options.weight_decay,
                # torch's own: nothing has to be compiled.
                "torch_adam": True,
            },
        },
    }
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
    if dtype == torch.float16:
        config["fp16"] = {
            "enabled": True,
            "initial_scale_power": FIRST_POWER,
            "loss_scale_window": GROWTH_INTERVAL,
            # Halve at every overflow, not at every second one.
            "hysteresis": 1,
            "min_loss_scale": int(LEAST),
        }
    if dtype != torch.float32:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _full_precision(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Copies of the float32 parameters in host memory."""
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}


def _set_masters(
    module: torch.nn.Module, full: Mapping[str, torch.Tensor], device: torch.device
) -> None:
    """Give the optimizer's float32 masters the bits that the parameters lost by rounding."""
    if not full:
        return
    tensors: Any = importlib.import_module("deepspeed.utils")
    for name, parameter in module.named_parameters():
        tensors.safe_set_full_fp32_param(parameter, full[name].to(device))


def _frozen(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The reference, whole on every process."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _sharded(library: Any, model: PreTrainedModel, config: dict[str, Any], offloads: bool) -> Any:
    """The reference sharded like the model under stage 3, its shards in host memory or not."""
    config = {key: value for key, value in config.items() if key != "optimizer"}
    if offloads:
        offload = {"device": "cpu", "pin_memory": True}
        config["zero_optimization"] = {**config["zero_optimization"], "offload_param": offload}
    kept = keep_buffers(model)
    engine, *_ = library.initialize(model=model, config=config)
    restore_buffers(model, kept)
    engine.eval()
    return engine


def _norm(parameters: Iterable[torch.Tensor]) -> float:
    grads = [p.grad for p in parameters if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0
