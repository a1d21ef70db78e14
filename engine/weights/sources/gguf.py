"""Tensors of a GGUF file under Hugging Face names, dequantised one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from engine.errors import CheckpointError
from engine.models.gguf_families import GGUFFamily, find_family
from engine.models.gguf_file import GGUFFile

_GLOBAL_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
    }
)
_LAYER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
# Rotary frequencies: part of the configuration, not of the weights.
_NOT_WEIGHTS = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")
_HEAD_COUNTS: Mapping[str, str] = MappingProxyType(
    {"attn_q": "head_count", "attn_k": "head_count_kv"}
)


def hf_name(name: str, family: GGUFFamily) -> str:
    """The Hugging Face name of a GGUF tensor. Raises CheckpointError for an unknown one."""
    layer = _LAYER.fullmatch(name)
    names = {**_LAYER_NAMES, **family.layer_names}
    if layer is not None and layer[2] in names:
        return f"model.layers.{layer[1]}.{names[layer[2]]}.{layer[3]}"
    stem, _, leaf = name.rpartition(".")
    if stem in _GLOBAL_NAMES:
        return f"{_GLOBAL_NAMES[stem]}.{leaf}"
    raise CheckpointError(f"the GGUF file has a tensor {name!r} of no known kind", field=name)


def _unpermute(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of a q or k projection from llama.cpp's order back to Hugging Face's.

    llama.cpp pairs neighbouring rows for the rotary embedding, [head, D/2, 2]; Hugging
    Face pairs a row with the one half a head further, [head, 2, D/2].
    """
    pairs = rows.unflatten(0, (num_heads, -1, 2))
    return pairs.transpose(1, 2).reshape(rows.shape)


def _permuted_heads(file: GGUFFile, family: GGUFFamily, name: str) -> int | None:
    """Heads of a tensor whose rows llama.cpp reorders: q and k of some architectures."""
    layer = _LAYER.fullmatch(name)
    if layer is None or not family.pairs_rows:
        return None
    key = _HEAD_COUNTS.get(layer[2])
    if key is None:
        return None
    counts, prefix = file.metadata, f"{file.metadata['general.architecture']}.attention"
    return int(counts.get(f"{prefix}.{key}", counts[f"{prefix}.head_count"]))


def tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, float32 tensor on the CPU) pairs of the file at `path`.

    Raises CheckpointError for a broken file, an unknown tensor, or a type that the gguf
    library cannot dequantise.
    """
    file = GGUFFile(path)
    family = find_family(file.metadata.get("general.architecture"))
    for name in file.tensors:
        if _NOT_WEIGHTS.fullmatch(name):
            continue
        tensor = torch.from_numpy(file.dequantize(name))
        num_heads = _permuted_heads(file, family, name)
        if num_heads is not None:
            tensor = _unpermute(tensor, num_heads)
        if name.endswith("norm.weight"):
            tensor -= family.norm_offset
        yield hf_name(name, family), tensor
