"""A character-level reward model, trained on pairs, for the largest of three digits: "3+9+4=" -> 9.

The loss is that of Bradley and Terry: -log sigmoid(score of the better - score of the worse).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from recipes.environments.base import heldout_problems, split_of
from recipes.rewards.exact import exact_match
from recipes.types import Message, Problem
from tests.helpers.char_model import VOCAB, char_model, char_tokenizer

DIGITS = "0123456789"


@dataclass(frozen=True)
class CharLargest:
    """The largest of three digits; an `Environment`."""

    name: str = "char_largest"
    max_new_tokens: int = 2
    heldout_one_in: int = 8

    def draw(self, rng: random.Random) -> Problem:
        digits = [rng.choice(DIGITS) for _ in range(3)]
        return Problem(
            question="+".join(digits) + "=", answer=max(digits), key="".join(sorted(digits))
        )

    def messages(self, problem: Problem) -> list[Message]:
        return [{"role": "user", "content": problem.question}]

    def verify(self, reply: str, problem: Problem) -> float:
        return exact_match(reply, problem.answer)


def reward_model(*, steps: int, seed: int = 0, batch: int = 64) -> LlamaForSequenceClassification:
    """A classifier of one label, taught on pairs of a right and a wrong answer."""
    torch.manual_seed(seed)
    config = char_model(hidden=64, layers=2, seed=seed).config
    config.num_labels, config.pad_token_id = 1, 0
    model = LlamaForSequenceClassification(config).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    rng = random.Random(seed)
    for _ in range(steps):
        better, worse = _pairs(rng, batch)
        scores = model(torch.cat([better, worse])).logits[:, 0]
        loss = -logsigmoid(scores[:batch] - scores[batch:]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def pair_accuracy(model: LlamaForSequenceClassification, num: int = 512) -> float:
    """Share of held-out pairs whose better answer has the higher score."""
    better, worse = _pairs(random.Random(99), num, split="heldout")
    return float((model(better).logits > model(worse).logits).float().mean())


def policy(*, accuracy: float, seed: int = 0, batch: int = 64) -> LlamaForCausalLM:
    """A causal model taught by worked problems until it is right so often on held-out ones."""
    model = char_model(hidden=64, layers=2, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    rng = random.Random(seed)
    for step in range(1000):
        ids = _encoded([f"{p.question}{p.answer}\n" for p in _problems(rng, batch, "train")])
        logits = model(ids[:, :-1]).logits[:, 5:]
        cross_entropy(logits.flatten(0, 1), ids[:, 6:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2 == 1 and true_accuracy(model) >= accuracy:
            break
    return model


@torch.no_grad()
def true_accuracy(model: LlamaForCausalLM) -> float:
    """Share of held-out problems that the likeliest reply answers."""
    problems = heldout_problems(CharLargest(), 128)
    replies = model(_encoded([p.question for p in problems])).logits[:, -1].argmax(-1)
    texts = [char_tokenizer().decode([token]) for token in replies.tolist()]
    return sum(t == p.answer for t, p in zip(texts, problems, strict=True)) / len(problems)


def write_reward_model(folder: Path, model: LlamaForSequenceClassification) -> None:
    """Write model and tokenizer as a Hugging Face folder."""
    model.save_pretrained(folder)
    char_tokenizer().write_hf(folder)


def _problems(rng: random.Random, num: int, split: str) -> list[Problem]:
    found: list[Problem] = []
    task = CharLargest()
    while len(found) < num:
        problem = task.draw(rng)
        if split_of(problem.key, task.heldout_one_in) == split:
            found.append(problem)
    return found


def _pairs(rng: random.Random, num: int, split: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
    problems = _problems(rng, num, split)
    wrong = [rng.choice(DIGITS.replace(problem.answer, "")) for problem in problems]
    better = _encoded([f"{p.question}{p.answer}\n" for p in problems])
    return better, _encoded([f"{p.question}{w}\n" for p, w in zip(problems, wrong, strict=True)])


def _encoded(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[VOCAB[char] for char in text] for text in texts])
