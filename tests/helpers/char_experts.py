"""A character-level mixture of experts and its task, as files: the largest of four digits,
"3725=" -> "7"."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.helpers.char_model import VOCAB, char_tokenizer

_BOTH = [
    *("--device", "cpu", "--dtype", "float32", "--kv-memory-gb", "0.02", "--max-new-tokens", "2"),
    *("--eval-prompts", "256", "--eval-every", "0", "--checkpoint-every", "0"),
]
SFT = [*_BOTH, "--steps", "16", "--batch-size", "64", "--lr", "3e-3"]
"""Flags of `recipes/sft.py` after which the model knows about half of the answers."""
GRPO = [*_BOTH, "--steps", "40", "--prompts-per-step", "16", "--samples", "8", "--lr", "1e-3"]
"""Flags of `recipes/grpo.py` that teach it most of the rest."""


def char_experts(hidden: int = 32, layers: int = 2, *, seed: int = 0) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE with random weights: eight experts a layer, two of them a token."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=len(VOCAB),
        hidden_size=hidden,
        moe_intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=hidden // 4,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    return Qwen3MoeForCausalLM(config).float().eval()


def write_char_experts(folder: Path, *, seed: int = 0) -> str:
    """Write model and tokenizer as a Hugging Face folder; returns its path."""
    char_experts(seed=seed).save_pretrained(folder)
    char_tokenizer().write_hf(folder)
    return str(folder)


def write_largest(path: Path) -> str:
    """Every four digits with the largest of them, as prompt, completion and answer."""
    rows = []
    for digits in itertools.product("0123456789", repeat=4):
        best = max(digits)
        rows.append({"prompt": f"{''.join(digits)}=", "completion": best, "answer": best})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
