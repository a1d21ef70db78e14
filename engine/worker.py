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

from engine.attention.base import CapturableBackend
from engine.attention.select import select
from engine.batch import RequestTable, StepBatch, build_batch
from engine.config import EngineConfig
from engine.errors import InvalidRequest
from engine.graphs import DecodeGraphs
from engine.kv.pool import KVPool
from engine.layers.runtime import LayerRuntime
from engine.memory import plan_memory
from engine.models.build import build_model
from engine.models.locate import locate
from engine.numerics import dtype_name, kernel_backend, resolve_device, resolve_dtype
from engine.pending import PendingStep, pack_sampled
from engine.prompt_logprobs import PromptScorer
from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    CommitUpdate,
    EngineFacts,
    LoadFromDisk,
    Reply,
    StepPlan,
    WeightCommand,
)
from engine.sampling import Sampler
from engine.transfer import Fetch, to_device
from engine.weights.open import open_source
from engine.weights.session import UpdateSession
from engine.weights.sources import safetensors

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT_LIMIT = 32768


class Worker:
    """Executes what the leader plans: `launch` for step plans, `handle` for weight commands."""

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
        # A graph pads its batch with rows that need a slot and a page of nobody's.
        num_scratch = int(config.cuda_graphs and device.type == "cuda")
        self._pool = self._build_pool(config, context, dtype, num_scratch)
        num_pages = self._pool.k_LNGKD.shape[1] - num_scratch
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
            num_slots=num_slots + num_scratch,
            context_length=context,
            page_size=config.cache.page_size,
            device=device,
        )
        self._sampler = Sampler(num_slots=num_slots + num_scratch, device=device, backend=backend)
        self._scorer = PromptScorer(self._model, self._sampler)
        self._graphs = self._build_graphs(num_slots, num_pages) if num_scratch else None
        self.facts = EngineFacts(
            model=config.model,
            num_pages=num_pages,
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
    def launch(self, plan: StepPlan) -> PendingStep:
        """Queue one step plan. On a GPU this returns before the step ran; the next one may
        be queued behind it at once, since tokens go from step to step on the device."""
        self._session.require_servable()
        self._table.enter(plan.new_rows)
        self._sampler.enter(plan.new_rows)
        self._scorer.enter(plan.new_rows)
        self._table.set_pages(plan)
        if len(plan.copy_src):
            copies = np.stack([plan.copy_src, plan.copy_dst]).astype(np.int64)
            self._pool.copy(*to_device(copies, self._device))
        if self._graphs is not None and self._is_plain_decode(plan):
            sampled = self._graphs.run(plan.slots, plan.kv_lens)
            return PendingStep(plan.step, Fetch(sampled), num_rows=len(plan.slots))
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
    ) -> PendingStep:
        slots = plan.slots[plan.samples]
        if len(slots) == 0:
            return PendingStep(plan.step, prompt=prompt)
        # As wide as in a captured step unless the logits change: both then sum alike.
        widen = self._device.type == "cpu" or self._sampler.edits(slots)
        logits_SV = self._model.compute_logits(hidden_TH[batch.last_T_of_S], widen=widen)
        drawn = self._sampler.draw(logits_SV, batch, slots, self._table)
        self._table.append(batch.slots_S, batch.kv_lens_S, drawn.token_S)
        fetch = Fetch(pack_sampled(drawn.token_S, drawn.logprob_S, drawn.entropy_S))
        return PendingStep(plan.step, fetch, num_rows=len(slots), top=drawn.top, prompt=prompt)

    def _is_plain_decode(self, plan: StepPlan) -> bool:
        if plan.query_lens.max() > 1 or not plan.samples.all():
            return False
        return self._sampler.is_plain(plan.slots) and not self._scorer.wants(plan)

    def _build_graphs(self, max_rows: int, scratch_page: int) -> DecodeGraphs | None:
        if not isinstance(self._attention, CapturableBackend):
            return None
        self._table.host_pages[max_rows] = scratch_page
        self._table.page_table[max_rows] = scratch_page
        return DecodeGraphs(
            self._model,
            self._table,
            self._sampler,
            self._attention,
            max_rows=max_rows,
            scratch_slot=max_rows,
        )

    def _build_pool(
        self, config: EngineConfig, context: int, dtype: torch.dtype, num_scratch: int
    ) -> KVPool:
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
            num_pages=plan.num_pages + num_scratch,
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
