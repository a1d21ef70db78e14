"""Tiny random checkpoints in real formats, written by transformers and the gguf library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from safetensors.torch import save_file

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    "smollm3": (transformers.SmolLM3Config, transformers.SmolLM3ForCausalLM),
    "olmo2": (transformers.Olmo2Config, transformers.Olmo2ForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "qwen2_moe": (transformers.Qwen2MoeConfig, transformers.Qwen2MoeForCausalLM),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
    "glm4_moe": (transformers.Glm4MoeConfig, transformers.Glm4MoeForCausalLM),
}
_OWN_SIZES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": None},
    "smollm3": {"num_hidden_layers": 4},
    # Two kinds of layers, a window that texts of tests exceed, and a scale that is not the usual.
    "gemma3": {
        "num_hidden_layers": 7,
        "head_dim": 32,
        "sliding_window": 16,
        "query_pre_attn_scalar": 32,
        "tie_word_embeddings": True,
    },
    # Eight experts of 32, two a token, and one dense layer where the family has such.
    "qwen3_moe": {
        "num_hidden_layers": 3,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "mlp_only_layers": [1],
    },
    "qwen2_moe": {
        "num_hidden_layers": 3,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "mlp_only_layers": [1],
    },
    "mixtral": {
        "num_hidden_layers": 3,
        "intermediate_size": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "glm4_moe": {
        "num_hidden_layers": 3,
        "head_dim": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_shared_experts": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
    },
}
_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_POST_NORMS = ("olmo2", "gemma3")
_K_QUANT_SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,)}


def tiny_hf(arch: str, seed: int = 0, *, classifier: bool = False, **overrides: Any) -> Any:
    """A tiny transformers model, float32, with every parameter random and none trivial.

    classifier: the family's ...ForSequenceClassification, of `num_labels` labels.
    """
    config_class, model_class = _CLASSES[arch]
    if classifier:
        family = config_class.__name__.removesuffix("Config")
        model_class = getattr(transformers, f"{family}ForSequenceClassification")
    sizes = {**SIZES, **_OWN_SIZES.get(arch, {}), **overrides}
    model = model_class(config_class(**sizes)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = name.endswith("norm.weight")
            # Gemma keeps the difference of a norm's weight from one.
            one = 0.0 if arch == "gemma3" else 1.0
            parameter.copy_(one + 0.2 * noise if is_norm else 0.15 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model


def write_tiny(
    path: Path,
    arch: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | int = "5GB",
    **overrides: Any,
) -> Any:
    """Write a Hugging Face folder of safetensors; return the transformers model in it.

    arch: a key of `_CLASSES`; overrides go to its configuration
    (`tie_word_embeddings`, `attention_bias`, `rope_parameters`, sizes ...).
    max_shard_size: small values give several files and an index.
    """
    model = tiny_hf(arch, seed, **overrides).to(dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return model


def write_fused(path: Path, model: Any) -> None:
    """The tensors of a transformers model as it names them in memory, experts in one, beside the
    config.json that is there."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors")


def write_tiny_gguf(
    path: Path,
    arch: str = "llama",
    *,
    quant: str = "F32",
    seed: int = 0,
    metadata: dict[str, Any] | None = None,
    **overrides: Any,
) -> Any:
    """Write a GGUF file as llama.cpp's converter would; return the transformers model that
    has exactly the values the file holds.

    quant: ggml type of the matrices; vectors are F32. K-quants, which the library cannot
    quantise to, get random blocks and need sizes that are multiples of 256.
    metadata: further keys, numbers or strings, below the architecture's prefix.
    """
    model = tiny_hf(arch, seed, **overrides)
    writer = gguf.GGUFWriter(str(path), arch)
    _write_sizes(writer, model.config, arch)
    for key, value in (metadata or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"{arch}.{key}", value)
    state = {}
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            state[name] = _write_tensor(writer, name, tensor, model.config, arch, quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_state_dict(state, strict=False)
    return model


def _write_sizes(writer: gguf.GGUFWriter, config: Any, arch: str) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if arch in ("qwen3", "gemma3"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    # An array of strings, as real files have, that a reader of sizes has to step over.
    writer.add_token_list([f"token{index}" for index in range(config.vocab_size)])


def _layer_name(rest: str, arch: str) -> str:
    if rest == "post_attention_layernorm" and arch in _POST_NORMS:
        return "post_attention_norm"
    return _GGUF_NAMES[rest]


def _gguf_name(name: str, arch: str) -> str:
    stem, _, leaf = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, index, rest = stem.split(".", 3)
        return f"blk.{index}.{_layer_name(rest, arch)}.{leaf}"
    return f"{_GGUF_NAMES[stem]}.{leaf}"


def _heads(name: str, config: Any, arch: str) -> int | None:
    if arch not in ("llama", "smollm3"):
        return None
    if ".q_proj." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".k_proj." in name else None


def _swap_pairs(array: np.ndarray, num_heads: int, split: tuple[int, int]) -> np.ndarray:
    shape = array.shape
    split_array = array.reshape(num_heads, *split, *shape[1:])
    return np.ascontiguousarray(split_array.swapaxes(1, 2).reshape(shape))


def _write_tensor(
    writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, config: Any, arch: str, quant: str
) -> torch.Tensor:
    """Add one tensor; return the values it reads back as, in Hugging Face order."""
    array = tensor.numpy().astype(np.float32)
    heads = _heads(name, config, arch)
    half = 0 if heads is None else array.shape[0] // heads // 2
    if heads is not None:
        array = _swap_pairs(array, heads, (2, half))
    offset = 1.0 if arch == "gemma3" and name.endswith("norm.weight") else 0.0
    array = array + np.float32(offset)
    kind = gguf.GGMLQuantizationType["F32" if array.ndim == 1 else quant]
    data = _quantize(array, kind)
    writer.add_tensor(_gguf_name(name, arch), data, raw_dtype=kind)
    values = np.array(gguf.quants.dequantize(data, kind), dtype=np.float32).reshape(array.shape)
    values = values - np.float32(offset)
    if heads is not None:
        values = _swap_pairs(values, heads, (half, 2))
    return torch.from_numpy(values)


def _quantize(array: np.ndarray, kind: Any) -> np.ndarray:
    if kind.name not in _K_QUANT_SCALES:
        return gguf.quants.quantize(array, kind)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows, blocks = array.shape[0], array.shape[1] // block_size
    rng = np.random.default_rng(abs(int(array.sum() * 1e6)))
    data = rng.integers(0, 256, (rows, blocks, block_bytes), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.0002).tobytes(), dtype=np.uint8)
    for offset in _K_QUANT_SCALES[kind.name]:
        data[:, :, offset : offset + 2] = scale
    return data.reshape(rows, blocks * block_bytes)
