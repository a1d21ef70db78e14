"""DeepSpeed's ZeRO as a back end of the sharded trainer (arXiv 1910.02054)."""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from engine.errors import InvalidRequest
from recipes.trainers.memory import recompute_layers
from recipes.trainers.options import OptimizerOptions
from recipes.trainers.sharded import write_hf_config
from trainer_bridge.adapters.base import WeightSource
from trainer_bridge.adapters.deepspeed import DeepSpeedSource

TAG = "deepspeed"
NEVER = 1 << 62


class DeepSpeedBackend:
    """A `Backend`. The default process group must be there.

    stage: 0 (plain data parallel), 1 (optimizer state sharded), 2 (gradients too), 3
    (parameters too). dtype: bfloat16 computes in it, with float32 masters inside the optimizer
    (stage 0: by autocast).
    Raises InvalidRequest, with how to install it, when DeepSpeed is missing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        options: OptimizerOptions,
        *,
        stage: int,
        device: torch.device,
        dtype: torch.dtype,
        keep_reference: bool = False,
    ) -> None:
        library = _import(device)
        model = model.eval()
        model.set_attn_implementation("sdpa")
        config = _config(options, stage, dtype)
        reference = copy.deepcopy(model).requires_grad_(False) if keep_reference else None
        if options.gradient_checkpointing:
            recompute_layers(model)
        engine, *_ = library.initialize(
            model=model, model_parameters=list(model.parameters()), config=config
        )
        self.model: Any = engine
        self.reference = None
        if reference is not None:
            self.reference = _frozen(library, reference, config, stage, device, dtype)
        self.weights: WeightSource = DeepSpeedSource(engine)
        self._stage = stage
        self._device = device
        self._dtype = dtype

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
        self.model.step()
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

    def autocast(self) -> AbstractContextManager[Any]:
        """From stage 1 on the module itself is in the dtype it computes in."""
        if self._stage > 0 or self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self._dtype)


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
    if dtype == torch.bfloat16 and stage == 0:
        # DeepSpeed's bfloat16 has float32 masters only from stage 1 on.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _frozen(
    library: Any,
    model: PreTrainedModel,
    config: dict[str, Any],
    stage: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    """The reference: whole on every process, or sharded like the model under stage 3."""
    if stage < 3:
        return model.to(device=device, dtype=dtype if stage > 0 else None)
    config = {key: value for key, value in config.items() if key != "optimizer"}
    engine, *_ = library.initialize(model=model, config=config)
    engine.eval()
    return engine


def _norm(parameters: Iterable[torch.Tensor]) -> float:
    grads = [p.grad for p in parameters if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0
