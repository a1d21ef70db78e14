"""One rank: owns the model, the KV pool and the request tables, and executes steps.

Legend: T tokens of the step, S rows that sample, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from engine.attention.select import select
from engine.batch import RequestTable, StepBatch, build_batch
from engine.config import EngineConfig
from engine.errors import InvalidRequest
from engine.kv.pool import KVPool
from engine.layers.runtime import LayerRuntime
from engine.memory import plan_memory
from engine.models.build import build_model
from engine.models.locate import locate
from engine.numerics import dtype_name, kernel_backend, resolve_device, resolve_dtype
from engine.prompt_logprobs import PromptScorer
from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    CommitUpdate,
    EngineFacts,
    LoadFromDisk,
    Reply,
    StepPlan,
    StepResult,
    WeightCommand,
)
from engine.sampling import Sampler, to_top
from engine.weights.open import open_source
from engine.weights.session import UpdateSession
from engine.weights.sources import safetensors

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT_LIMIT = 32768


class Worker:
    """Executes what the leader plans: `step` for step plans, `handle` for weight commands."""

    def __init__(self, config: EngineConfig) -> None:
        started = time.perf_counter()
        device = resolve_device(config.device)
        dtype = resolve_dtype(config.dtype, device)
        files = locate(config.model, config.load_format)
        backend = kernel_backend(device)
        self._device = device
        context = _context_length(config, files.config.max_position)
        runtime = LayerRuntime(device=device, dtype=dtype, backend=backend)
        self._model = build_model(files.config, runtime=runtime, max_position=context)
        self._session = UpdateSession(self._model, version=config.weight_version)
        source = open_source(files.kind, files.path, self._model, config.seed)
        self._session.load_initial(source)
        self._pool = self._build_pool(config, context, dtype)
        head_dim = files.config.head_dim
        choice = select(
            config.attention,
            self._pool,
            num_heads=files.config.num_heads,
            scale=head_dim**-0.5,
            device=device,
        )
        logger.info("attention back end %s (%s)", choice.backend.name, choice.reason)
        self._attention = choice.backend
        num_slots = config.scheduler.max_running
        self._table = RequestTable(
            num_slots=num_slots,
            context_length=context,
            page_size=config.cache.page_size,
            device=device,
        )
        self._sampler = Sampler(num_slots=num_slots, device=device, backend=backend)
        self._scorer = PromptScorer(self._model, self._sampler)
        self.facts = EngineFacts(
            model=config.model,
            num_pages=self._pool.k_LNGKD.shape[1],
            page_size=config.cache.page_size,
            context_length=context,
            vocab_size=files.config.vocab_size,
            eos_ids=list(files.config.eos_token_ids),
            dtype=dtype_name(dtype),
            device=device.type,
            attention=choice.backend.name,
            num_parameters=sum(p.numel() for p in self._model.parameters()),
            load_seconds=time.perf_counter() - started,
        )

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult:
        """Run one step plan to its result. Blocks until the tokens are on the host."""
        self._session.require_servable()
        self._table.enter(plan.new_rows)
        self._sampler.enter(plan.new_rows)
        self._scorer.enter(plan.new_rows)
        self._table.set_pages(plan)
        if len(plan.copy_src):
            self._pool.copy(self._to_device(plan.copy_src), self._to_device(plan.copy_dst))
        batch = build_batch(plan, self._table, self._attention)
        hidden_TH = self._model(batch.input_ids_T, batch)
        prompt = self._scorer.score(plan, batch, hidden_TH)
        return self._sample(plan, batch, hidden_TH, prompt)

    def handle(self, command: WeightCommand) -> Reply:
        """Run one command of a weight update; raises WeightUpdateError subclasses."""
        match command:
            case BeginUpdate():
                self._session.begin(command)
                return Reply()
            case LoadFromDisk():
                self._session.receive(safetensors.tensors(Path(command.path)))
                return Reply()
            case CommitUpdate():
                return Reply(report=self._session.commit(command.version))
            case AbortUpdate():
                self._session.abort(command.version)
                return Reply()

    def receive(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Feed the open update from tensors of this process, which stay theirs until commit."""
        self._session.receive(tensors)

    def _sample(
        self, plan: StepPlan, batch: StepBatch, hidden_TH: torch.Tensor, prompt: list
    ) -> StepResult:
        slots = plan.slots[plan.samples]
        if len(slots) == 0:
            empty = np.zeros(0, dtype=np.int32)
            return StepResult(
                step=plan.step, token_ids=empty, logprobs=empty.astype(np.float32), prompt=prompt
            )
        logits_SV = self._model.compute_logits(hidden_TH[batch.last_T_of_S])
        tokens, logprobs, top = self._sampler.draw(logits_SV, batch, slots, self._table)
        self._table.append(batch.slots_S, batch.kv_lens_S, tokens)
        return StepResult(
            step=plan.step,
            token_ids=tokens.to(torch.int32).cpu().numpy(),
            logprobs=logprobs.cpu().numpy(),
            top=to_top(top) if top is not None else None,
            prompt=prompt,
        )

    def _to_device(self, ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(ids.astype(np.int64)).to(self._device)

    def _build_pool(self, config: EngineConfig, context: int, dtype: torch.dtype) -> KVPool:
        model = self._model.config
        page_bytes = KVPool.page_bytes(
            num_layers=model.num_layers,
            page_size=config.cache.page_size,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=dtype,
        )
        # Per token of the largest step: hidden states, MLP and a slice of the logits.
        per_token = 4 * (8 * model.hidden_size + 3 * model.intermediate_size)
        logits = 3 * 4 * config.scheduler.max_running * model.vocab_size
        plan = plan_memory(
            config.cache,
            page_bytes=page_bytes,
            workspace_bytes=config.scheduler.max_step_tokens * per_token + logits,
            device=self._device,
            context_length=context,
            max_running=config.scheduler.max_running,
        )
        logger.info("%s", plan.describe())
        return KVPool(
            num_layers=model.num_layers,
            num_pages=plan.num_pages,
            page_size=config.cache.page_size,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=dtype,
            device=self._device,
        )


def _context_length(config: EngineConfig, longest: int) -> int:
    if config.context_length is None:
        return min(longest, DEFAULT_CONTEXT_LIMIT)
    if not 0 < config.context_length <= longest:
        raise InvalidRequest(
            f"{config.context_length} is not within the model's {longest} positions",
            field="context_length",
        )
    return config.context_length
