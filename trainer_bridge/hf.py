"""A transformers model with the weights the engine itself would load.

transformers reads safetensors folders; GGUF files it reads slowly and only into models that
refuse to be saved. Here the model is built from its configuration and filled from any source
of (Hugging Face name, tensor), the same that the engine loads from, so that trainer and
engine start from equal numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from engine.errors import CheckpointError
from trainer_bridge.filling import fill

# In-place draws: methods of tensors, and the functions of `torch.nn.init` that ask a mode first.
_RANDOM = frozenset({"normal_", "uniform_", "kaiming_uniform_"})


def load_causal_lm(
    hf_config: dict[str, Any],
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> torch.nn.Module:
    """Build a transformers causal LM from a config.json's contents and named tensors.

    Raises CheckpointError, naming the tensor, for one that is unknown, missing, misshapen or no
    float, that comes twice, or unlike the other name of a tied one (`filling.fill`); and for rotary
    frequencies of a GGUF file that transformers has no setting for.
    """
    import transformers

    require_language_model(hf_config)
    return _build(transformers.AutoModelForCausalLM, hf_config, tensors, dtype).to(device)


def require_language_model(hf_config: Mapping[str, Any]) -> None:
    """Raises CheckpointError (`architectures`) for a config.json of a sequence classifier, which
    neither generates nor says how likely a token is."""
    if is_classifier(hf_config):
        raise CheckpointError(
            f"{hf_config['architectures'][0]} scores sequences and has no language-model head; "
            "give a ...ForCausalLM checkpoint",
            field="architectures",
        )


def load_classifier(
    hf_config: dict[str, Any],
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> torch.nn.Module:
    """Build a transformers sequence classifier, such as a reward model, from a config.json's
    contents and named tensors: `model` is its decoder, `score` its head. A critic may begin so.

    Raises CheckpointError as `load_causal_lm` does, and for a checkpoint that is no classifier.
    """
    import transformers

    name = hf_config["architectures"][0]
    if not is_classifier(hf_config):
        raise CheckpointError(
            f"{name} has no classification head; give a ...ForSequenceClassification checkpoint",
            field="architectures",
        )
    auto = transformers.AutoModelForSequenceClassification
    return _build(auto, hf_config, tensors, dtype).to(device)


def is_classifier(hf_config: Mapping[str, Any]) -> bool:
    """Whether the contents of a config.json are those of a sequence classifier."""
    return str(hf_config["architectures"][0]).endswith("ForSequenceClassification")


def _build(
    auto: Any,
    hf_config: dict[str, Any],
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
) -> torch.nn.Module:
    """The model that `auto`, a class of transformers, makes of a configuration, filled."""
    import transformers

    _refuse_divisors(hf_config)
    architecture = getattr(transformers, hf_config["architectures"][0])
    values = {key: value for key, value in hf_config.items() if key != "model_type"}
    config = architecture.config_class(**values)
    with _NoRandomParameters():
        model: torch.nn.Module = auto.from_config(config, dtype=dtype)
    fill(model, tensors)
    return model


class _NoRandomParameters(TorchFunctionMode):
    """Leaves parameters uninitialised that torch or transformers would draw at random, which
    takes longer than everything else, and every one of which is filled afterwards. Constants,
    buffers and ties are made as ever."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = kwargs or {}
        target = args[0] if args else options.get("tensor")
        if isinstance(target, torch.nn.Parameter) and func.__name__ in _RANDOM:
            return target
        return func(*args, **options)


def _refuse_divisors(hf_config: dict[str, Any]) -> None:
    """The engine divides frequencies by what a GGUF file lists; transformers would not."""
    divisors = (hf_config.get("rope_parameters") or {}).get("frequency_divisors")
    if divisors is not None and set(divisors) != {1.0}:
        raise CheckpointError(
            "this GGUF file scales its rotary frequencies by rope_freqs.weight, which a trainer's "
            "model cannot; train from the model's Hugging Face folder",
            field="rope_freqs.weight",
        )
