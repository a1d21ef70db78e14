"""A character-level model and its task: two-digit addition, "12+34=" -> "46"."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.environments.base import heldout_problems, problem_at
from recipes.rewards.exact import exact_match
from recipes.types import Message, Problem
from rollout.text.special_tokens import SpecialTokens
from rollout.text.tokenizer import Tokenizer

CHARACTERS = "0123456789+= \n"
EOS = "<eos>"
VOCAB = {EOS: 0, **{c: i + 1 for i, c in enumerate(CHARACTERS)}}


@dataclass(frozen=True)
class CharAddition:
    """a + b for two numbers of two digits; an `Environment`."""

    name: str = "char_addition"
    max_new_tokens: int = 5
    heldout_one_in: int = 16

    def draw(self, rng: random.Random) -> Problem:
        a, b = rng.randrange(10, 100), rng.randrange(10, 100)
        return Problem(question=f"{a}+{b}=", answer=str(a + b), key=f"{a}+{b}")

    def messages(self, problem: Problem) -> list[Message]:
        return [{"role": "user", "content": problem.question}]

    def verify(self, reply: str, problem: Problem) -> float:
        return exact_match(reply, problem.answer)


def char_tokenizer() -> Tokenizer:
    """One token a character, no chat template."""
    backend = tokenizers.Tokenizer(models.WordLevel(VOCAB, unk_token=EOS))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([tokenizers.AddedToken(EOS, special=True)])
    return Tokenizer(backend, SpecialTokens(eos=EOS, eos_ids=[0]))


def char_model(hidden: int = 128, layers: int = 3, *, seed: int = 0) -> LlamaForCausalLM:
    """A Llama with random weights; 0.6M parameters by default."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCAB),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).float().eval()


def write_char_model(folder: Path, model: LlamaForCausalLM) -> None:
    """Write model and tokenizer as a Hugging Face folder."""
    model.save_pretrained(folder)
    char_tokenizer().write_hf(folder)


def fine_tune(
    model: LlamaForCausalLM, accuracy: float, *, max_steps: int = 1000, batch: int = 128
) -> float:
    """Supervised steps on random training problems until the greedy held-out accuracy is
    reached, looked at every 20 steps; returns it. Loss on answer and line end alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    heldout = heldout_problems(CharAddition(), 128)
    reached = 0.0
    for step in range(max_steps):
        ids = _worked(range(step * batch, (step + 1) * batch))
        targets = ids[:, 6:].masked_fill(ids[:, 6:] == VOCAB[" "], -100)
        logits = model(ids[:, :-1]).logits[:, 5:]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            reached = greedy_accuracy(model, heldout)
        if reached >= accuracy:
            break
    return reached


@torch.no_grad()
def greedy_accuracy(model: LlamaForCausalLM, problems: Sequence[Problem]) -> float:
    """Share of problems whose likeliest continuation is the answer and the end of the line."""
    tokenizer = char_tokenizer()
    ids = torch.tensor([tokenizer.encode(p.question) for p in problems])
    for _ in range(4):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    replies = [tokenizer.decode(row).split("\n")[0] for row in ids[:, 6:].tolist()]
    right = [reply == p.answer for reply, p in zip(replies, problems, strict=True)]
    return sum(right) / len(right)


def _worked(indices: range) -> torch.Tensor:
    """Problems of the training stream with their answers, padded with blanks to one length."""
    problems = [problem_at(CharAddition(), "train", -1, i) for i in indices]
    texts = [f"{p.question}{p.answer}\n".ljust(10) for p in problems]
    tokenizer = char_tokenizer()
    return torch.tensor([tokenizer.encode(text) for text in texts])
