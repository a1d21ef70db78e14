"""What a rank refuses by name before it reads a weight: options that cannot be honoured."""

from __future__ import annotations

from engine.config import EngineConfig, KVDType
from engine.errors import UnsupportedOption
from engine.models.config import ModelConfig
from engine.speculative.checks import check_speculative

_FIRST_WITH_FP8 = (8, 9)


def check_options(config: EngineConfig, model: ModelConfig) -> None:
    """A rank calls this first. Raises UnsupportedOption and InvalidRequest."""
    if config.numerics != "fast":
        raise UnsupportedOption(
            f"{config.numerics!r} is not built: bits depend on how many rows a step has; use "
            "'fast'",
            field="numerics",
        )
    if config.cache.kv_scales != "token":
        raise UnsupportedOption(
            f"{config.cache.kv_scales!r} is not built: scales of fp8 KV are each token's own; use "
            "'token'",
            field="kv_scales",
        )
    _check_experts(config, model)
    check_speculative(config.speculative, num_labels=model.num_labels)


def _check_experts(config: EngineConfig, model: ModelConfig) -> None:
    if model.experts is None:
        if config.parallel.ep:
            raise UnsupportedOption(
                f"{model.architecture} has no experts to divide among the ranks; leave it out",
                field="parallel.ep",
            )
        if config.return_routed_experts:
            raise UnsupportedOption(
                f"{model.architecture} has no experts and so no routes to keep; leave it out",
                field="return_routed_experts",
            )
        return
    if config.parallel.ep and config.parallel.dp_size > 1:
        raise UnsupportedOption(
            f"experts are divided among the --tp ranks of one copy, not among the "
            f"{config.parallel.dp_size} copies of --dp; use one of the two",
            field="parallel.ep",
        )
    if config.quantization != "none":
        raise UnsupportedOption(
            f"{config.quantization!r} is not built for experts, which are nearly all weights of "
            f"{model.architecture}; use 'none'",
            field="quantization",
        )


def check_kv_dtype(
    kv_dtype: KVDType, dtype: str, compute_capability: tuple[int, int] | None
) -> None:
    """Refuse fp8 KV where it cannot be kept. dtype: of the model. compute_capability: of the GPU;
    None on a CPU. Raises UnsupportedOption."""
    if kv_dtype == "auto":
        return
    if dtype == "float16":
        raise UnsupportedOption(
            f"{kv_dtype!r} does not go with float16: probabilities times scales leave its range; "
            "use bfloat16, or 'auto'",
            field="kv_dtype",
        )
    if compute_capability is not None and compute_capability < _FIRST_WITH_FP8:
        raise UnsupportedOption(
            f"{kv_dtype!r} needs a GPU that has fp8 (compute capability 8.9 or more); this one has "
            f"{'.'.join(map(str, compute_capability))}; use 'auto'",
            field="kv_dtype",
        )
