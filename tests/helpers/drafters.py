"""Engines that draft, and drafters of known quality to put in place of their own.

R rows, K most drafts of a row, N texts of at most W tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from engine.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculativeConfig
from engine.executor import LocalExecutor, build_executor
from engine.protocol import DraftSources, Request, RequestOutput
from rollout.replica.inline import InlineReplica


class Drafter(Protocol):
    """What a worker asks of what drafts."""

    def enter(self, changes: DraftSources) -> None: ...

    def propose(
        self,
        slots_R: torch.Tensor,
        draft_lens_R: torch.Tensor,
        drafts_RK: torch.Tensor,
        drafted_R: torch.Tensor,
    ) -> None: ...


class KnownTexts:
    """Drafts from what plain decoding gave for each request, found by its seed.

    shift: added to every draft: 0 is right, anything else is wrong. mixed: where a hash of slot,
    length and draft says so only, and as many drafts as another says. Runs within a graph too.
    """

    def __init__(
        self,
        worker: Any,
        texts: dict[int, list[int]],
        vocab_size: int,
        *,
        shift: int = 0,
        mixed: bool = False,
    ) -> None:
        self._table, self._seeds = worker._table, worker._sampler._seed
        self._vocab_size, self._shift, self._mixed = vocab_size, shift, mixed
        width, device = max(map(len, texts.values())), self._table.device
        padded = [text + [0] * (width - len(text)) for text in texts.values()]
        self._keys_N = torch.tensor(list(texts), device=device)
        self._texts_NW = torch.tensor(padded, device=device)
        self._sizes_N = torch.tensor([len(text) for text in texts.values()], device=device)

    def enter(self, changes: DraftSources) -> None:
        pass

    def propose(
        self,
        slots_R: torch.Tensor,
        draft_lens_R: torch.Tensor,
        drafts_RK: torch.Tensor,
        drafted_R: torch.Tensor,
    ) -> None:
        slots, num_drafts = slots_R.long(), drafts_RK.shape[1]
        length_R, limit_R = self._table.length[slots].long(), self._table.limit[slots].long()
        known_RN = self._seeds[slots][:, None] == self._keys_N
        text_R = known_RN.long().argmax(1)
        nth_K = torch.arange(num_drafts, device=slots.device)
        at_RK = (length_R[:, None] + nth_K).clamp(0, self._texts_NW.shape[1] - 1)
        right_RK = self._texts_NW[text_R[:, None], at_RK]
        wrong_RK = (right_RK + max(self._shift, 1)) % self._vocab_size
        room_R = torch.minimum(limit_R - length_R - 1, self._sizes_N[text_R] - length_R)
        lens_R = torch.minimum(draft_lens_R.long(), room_R).clamp(min=0) * known_RN.any(1)
        if self._mixed:
            hash_RK = (slots[:, None] * 31 + length_R[:, None] * 17 + nth_K * 7) % 11
            drafts_RK.copy_(torch.where(hash_RK < 8, right_RK, wrong_RK))
            lens_R = torch.minimum(lens_R, (slots * 5 + length_R * 3) % (num_drafts + 2))
        else:
            drafts_RK.copy_(wrong_RK if self._shift else right_RK)
        drafted_R.copy_(lens_R)


class DraftingEngine:
    """An inline replica that drafts, with its worker at hand."""

    def __init__(
        self,
        model: str | Path,
        *,
        k: int = 3,
        method: str = "ngram",
        num_pages: int = 400,
        page_size: int = 8,
        max_running: int = 64,
        max_step_tokens: int = 512,
        context_length: int | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        cuda_graphs: bool = True,
        overlap: bool | None = None,
        allow_forced: bool = False,
    ) -> None:
        config = EngineConfig(
            model=str(model),
            dtype=dtype,
            device=device,
            context_length=context_length,
            cuda_graphs=cuda_graphs,
            cache=CacheConfig(num_pages=num_pages, page_size=page_size),
            scheduler=SchedulerConfig(
                max_running=max_running,
                max_step_tokens=max_step_tokens,
                max_chunk_tokens=128,
                overlap=overlap,
                check_integrity=True,
            ),
            speculative=SpeculativeConfig(
                method=method, draft_tokens=k, allow_forced_acceptance=allow_forced
            ),
        )
        self._executor: LocalExecutor = build_executor(config)
        self.replica = InlineReplica(config, self._executor)
        self.vocab_size = self._executor.facts.vocab_size

    @property
    def worker(self) -> Any:
        return self._executor._worker

    def draft_with(self, drafter: Drafter) -> None:
        """Put a drafter in place of the engine's own."""
        for owner in (self.worker, self.worker._verifier, self.worker._graphs):
            if owner is not None:
                owner._drafter = drafter

    def draft_texts(self, texts: dict[int, list[int]], **options: Any) -> None:
        """Draft from known texts, by seed; see `KnownTexts`."""
        self.draft_with(KnownTexts(self.worker, texts, self.vocab_size, **options))

    def __enter__(self) -> DraftingEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.replica.close()


def texts_of(
    requests: Iterable[Request], outputs: dict[str, RequestOutput]
) -> dict[int, list[int]]:
    """Prompt and output of each request by its seed, which no two may share."""
    asked = list(requests)
    texts = {
        one.seed: [*one.prompt_ids.tolist(), *outputs[one.rid].token_ids.tolist()] for one in asked
    }
    assert len(texts) == len(asked), "two requests have one seed"
    return texts


def random_prompts(count: int, vocab_size: int, *, longest: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random lengths; every other one repeats a few tokens."""
    rng = np.random.default_rng(seed)
    prompts = []
    for nth in range(count):
        size = int(rng.integers(1, longest + 1))
        period = size if nth % 2 else int(rng.integers(1, 6))
        prompts.append(np.resize(rng.integers(3, vocab_size, period), size).tolist())
    return prompts
