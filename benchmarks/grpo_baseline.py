"""GRPO as a plain script: transformers' `generate`, padded batches, AdamW.

What `benchmarks/grpo_step.py` compares with. It does what a careful person would write without an
engine: logits only where they are needed, groups without spread skipped, a copy of the model
in the rollout dtype where that is not float32, fused AdamW, one update a step.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from recipes.collecting.prompts import Prompts
from recipes.environments.base import Environment
from recipes.types import Problem

STD_EPSILON = 1e-4


@dataclass(kw_only=True)
class Seconds:
    """Seconds of one step by phase."""

    generate: float = 0.0
    score: float = 0.0
    train: float = 0.0
    push: float = 0.0
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def step(self) -> float:
        return self.generate + self.score + self.train + self.push


class Baseline:
    """A model, its optimizer, and the copy that generates."""

    def __init__(
        self,
        model: Any,
        prompts: Prompts,
        *,
        dtype: torch.dtype,
        samples: int,
        min_new_tokens: int = 0,
        max_new_tokens: int,
        lr: float,
        rows_per_microbatch: int,
    ) -> None:
        self.model = model.float().eval()
        self.dtype = dtype
        self.generator = self.model
        if dtype != torch.float32:
            self.generator = copy.deepcopy(self.model).to(dtype)
        self.prompts = prompts
        self.samples = samples
        self.min_new_tokens = min_new_tokens
        self.max_new_tokens = max_new_tokens
        self.rows = rows_per_microbatch
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=lr, weight_decay=0.0, fused=True
        )

    def step(self, problems: list[Problem], environment: Environment) -> Seconds:
        """Rollout, reward, advantage, loss, update, copy."""
        seconds = Seconds()
        marks = [time.perf_counter()]
        ids, mask, prompt_len = self._pad(problems)
        out = self._generate(ids, mask)
        marks.append(time.perf_counter())
        response, response_mask = self._responses(out, prompt_len)
        rewards = self._rewards(response, response_mask, problems, environment)
        marks.append(time.perf_counter())
        self._train(out, mask, response, response_mask, rewards)
        marks.append(time.perf_counter())
        self._copy_weights()
        marks.append(time.perf_counter())
        phases = np.diff(marks).tolist()
        seconds.generate, seconds.score, seconds.train, seconds.push = phases
        spread = rewards.reshape(len(problems), -1).std(dim=1) > 0
        seconds.extra = {
            "reward": float(rewards.mean()),
            "mixed_groups": float(spread.sum()),
            "mean_length": float(response_mask.sum() / len(response_mask)),
        }
        return seconds

    def _pad(self, problems: list[Problem]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Left-padded prompts, each repeated for its samples."""
        rows = [self.prompts.prompt_ids(p) for p in problems for _ in range(self.samples)]
        longest = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros(len(rows), longest, dtype=torch.int64)
        for index, row in enumerate(rows):
            ids[index, longest - len(row) :] = torch.from_numpy(row)
            mask[index, longest - len(row) :] = 1
        return ids, mask, longest

    @torch.inference_mode()
    def _generate(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.generator.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=self.min_new_tokens or None,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.prompts.stop_ids,
            pad_token_id=self.prompts.stop_ids[0],
        )
        return out

    def _responses(self, out: torch.Tensor, prompt_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Response ids and which of them count: up to and with the first stop token."""
        response = out[:, prompt_len:].clone()
        stops = torch.isin(response, torch.tensor(self.prompts.stop_ids))
        before = stops.long().cumsum(1) - stops.long()
        return response, before == 0

    def _rewards(
        self,
        response: torch.Tensor,
        response_mask: torch.Tensor,
        problems: list[Problem],
        environment: Environment,
    ) -> torch.Tensor:
        rewards = []
        for index, (ids, mask) in enumerate(zip(response, response_mask, strict=True)):
            text = self.prompts.reply_text(ids[mask].numpy().astype(np.int32))
            rewards.append(environment.verify(text, problems[index // self.samples]))
        return torch.tensor(rewards)

    def _train(
        self,
        out: torch.Tensor,
        mask: torch.Tensor,
        response: torch.Tensor,
        response_mask: torch.Tensor,
        rewards: torch.Tensor,
    ) -> None:
        grouped = rewards.reshape(-1, self.samples)
        centred = grouped - grouped.mean(dim=1, keepdim=True)
        advantages = (centred / (grouped.std(dim=1, keepdim=True) + STD_EPSILON)).flatten()
        learning = torch.nonzero(advantages != 0).flatten()
        weights = advantages / response_mask.sum(dim=1) / len(advantages)
        # The last response token is predicted, never fed.
        inputs = out[:, :-1]
        attend = torch.cat([mask, response_mask[:, :-1].long()], dim=1)
        # `split` makes one part even of nothing.
        for rows in learning.split(self.rows) if len(learning) else ():
            logprobs = self._logprobs(inputs[rows], attend[rows], response[rows])
            ratio = (logprobs - logprobs.detach()).exp()
            loss = -(ratio * weights[rows, None] * response_mask[rows]).sum()
            loss.backward()
        if len(learning):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def _logprobs(
        self, inputs: torch.Tensor, attend: torch.Tensor, response: torch.Tensor
    ) -> torch.Tensor:
        positions = (attend.cumsum(1) - 1).clamp(min=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            logits = self.model(
                inputs,
                attention_mask=attend,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=response.shape[1],
            ).logits
        logits = logits.float()
        chosen = logits.gather(-1, response[:, :, None])[:, :, 0]
        return chosen - logits.logsumexp(dim=-1)

    @torch.no_grad()
    def _copy_weights(self) -> None:
        if self.generator is self.model:
            return
        for target, source in zip(
            self.generator.parameters(), self.model.parameters(), strict=True
        ):
            target.copy_(source)
