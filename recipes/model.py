"""The model that learns: a transformers causal LM with the engine's starting weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from recipes.actor import Actor
from recipes.options import Options
from recipes.trainers.plain import Trainer
from rollout.launch import read_checkpoint
from rollout.offline import Tokenizer
from trainer_bridge import load_causal_lm


def load_trainer(options: Options, actor: Actor) -> Trainer:
    """A trainer on the engine's device, with autocast in the engine's dtype."""
    state = actor.state()
    checkpoint = read_checkpoint(options.model, options.load_format, options.seed)
    model = load_causal_lm(checkpoint.hf_config, checkpoint.tensors)
    assert isinstance(model, PreTrainedModel)
    return Trainer(
        model,
        options.optimizer,
        device=torch.device(state.device),
        autocast_dtype=engine_dtype(actor),
        temperature=options.rollout.temperature,
        keep_reference=options.objective.kl_coef > 0,
    )


def engine_dtype(actor: Actor) -> torch.dtype:
    """The dtype the engine serves in."""
    dtype = getattr(torch, actor.state().dtype.removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype


def save_model(
    model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype
) -> None:
    """Write model and tokenizer in Hugging Face format, the weights in `dtype`.

    The model itself is cast: call this when training is over.
    """
    model.to(dtype=dtype).save_pretrained(folder)
    tokenizer.write_hf(folder)
