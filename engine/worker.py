"""One rank: owns the model, the KV pool and the request tables, and executes steps.

Legend: T tokens of the step, S rows that sample, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from functools import partial

import numpy as np
import torch

from engine.allocation import allocate_model, num_parameters
from engine.attention.base import CapturableBackend
from engine.attention.select import select
from engine.batch import RequestTable
from engine.config import DEFAULT_CONTEXT_LIMIT, EngineConfig
from engine.eager import EagerSteps
from engine.errors import InvalidRequest
from engine.graphs import DecodeGraphs
from engine.late_draw import draw_late
from engine.layers.runtime import LayerRuntime
from engine.models.labels import label_names
from engine.models.locate import locate
from engine.numerics import (
    compute_capability,
    dtype_name,
    kernel_backend,
    resolve_device,
    resolve_dtype,
)
from engine.occupancy import Occupancy
from engine.option_checks import check_kv_dtype, check_options
from engine.parallel.connect import connect, rank_device
from engine.parallel.mesh import Mesh
from engine.pending import LaunchedStep, MaskedStep, PendingStep, Runs, Sample
from engine.pools import PoolBuilder
from engine.profiler import RankProfiler
from engine.prompt_logprobs import PromptScorer
from engine.protocol import (
    BesideSteps,
    EngineCommand,
    EngineFacts,
    ReleaseMemory,
    Reply,
    ResumeMemory,
    StartProfile,
    StepMasks,
    StepPlan,
    StopProfile,
)
from engine.quant.schemes import linear_method
from engine.sampling import Sampler
from engine.speculative.checks import check_attention, max_verified
from engine.speculative.ngram import NgramDrafter
from engine.speculative.verify import Verifier
from engine.transfer import Fetch
from engine.weights.initial import load_initial
from engine.weights.lane import PendingCommand
from engine.weights.open import open_source, origin_of
from engine.weights.service import WeightService

logger = logging.getLogger(__name__)


class Worker:
    """Executes what the leader plans: `launch` for step plans, `handle` for weight commands."""

    def __init__(self, config: EngineConfig, *, rank: int = 0, meeting_place: str = "") -> None:
        """rank, meeting_place: as in `engine.executor.build_executor`."""
        started = time.perf_counter()
        self._mesh = Mesh.of(config.parallel, rank)
        device = rank_device(resolve_device(config.device), config.parallel, self._mesh)
        dtype = resolve_dtype(config.dtype, device)
        files = locate(config.model, config.load_format)
        files.config.require_dtype(dtype_name(dtype))
        check_options(config, files.config)
        check_kv_dtype(config.cache.kv_dtype, dtype_name(dtype), compute_capability(device))
        backend = kernel_backend(device)
        linear = linear_method(config.quantization, backend)
        self._device = device
        self._profiler = RankProfiler(device, rank)
        context = _context_length(config, files.config.max_position)
        self._collectives = connect(
            self._mesh,
            device,
            meeting_place=meeting_place,
            timeout_s=config.parallel.timeout_s,
            releasable=config.memory.saver,
        )
        runtime = LayerRuntime(
            device=device,
            dtype=dtype,
            backend=backend,
            mesh=self._mesh,
            collectives=self._collectives,
            linear=linear,
        )
        self._occupancy = Occupancy(config.memory, device)
        self._keeps_weights = config.memory.cpu_backup
        self._model = allocate_model(
            files.config, runtime=runtime, max_position=context, occupancy=self._occupancy
        )
        self._weights = WeightService(
            self._model,
            # Started again: the version last published may come again, not one before it.
            version=config.weight_version - bool(config.refusal),
            device=device,
            mesh=self._mesh,
            agree=self._collectives.agree,
            require_weights=partial(self._occupancy.require, "weights"),
        )
        source = open_source(files.kind, files.path, self._model, config.weight_seed)
        catalog = self._weights.session.catalog
        load_initial(catalog, source, origin_of(files.kind, files.path))
        if config.refusal:
            self._weights.session.invalidate(config.refusal)
        # A graph pads its batch with rows that need a slot and a page of nobody's.
        has_graphs = config.cuda_graphs and device.type == "cuda"
        # What graphs hold are decode steps, which a classifier has none of.
        drafts = config.speculative.enabled
        num_scratch = int((has_graphs or drafts) and not files.config.num_labels)
        self._pools = PoolBuilder(
            config=config,
            model=self._model,
            mesh=self._mesh,
            collectives=self._collectives,
            occupancy=self._occupancy,
            device=device,
            dtype=dtype,
            context=context,
            num_scratch=num_scratch,
            # Full tensors as they come, whatever of them is stored here, and as what.
            shadow_bytes=catalog.full_bytes() if config.memory.reserve_shadow else 0,
        ).build()
        num_pages = self._pools.kv.num_pages - num_scratch
        choice = select(
            config.attention,
            self._pools.kv,
            num_heads=files.config.num_heads // self._mesh.tp_size,
            scale=files.config.attention_scale,
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
        self._eager = EagerSteps(
            self._model,
            self._table,
            self._sampler,
            self._scorer,
            self._attention,
            self._pools.routes,
        )
        self._masked: MaskedStep | None = None
        self._scratch_slot = num_slots
        if num_scratch:
            self._table.host_pages[num_slots] = num_pages
            self._table.page_table[num_slots] = num_pages
        self._drafter = self._build_drafter(config) if drafts else None
        self._verifier = self._build_verifier(self._drafter) if self._drafter else None
        self._graphs = self._build_graphs(config) if has_graphs and num_scratch else None
        if self._graphs is not None and config.capture_at_start:
            with torch.inference_mode():
                self._graphs.capture_all()
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
            num_parameters=num_parameters(self._model),
            load_seconds=time.perf_counter() - started,
            tp_size=self._mesh.tp_size,
            dp_size=self._mesh.dp_size,
            architecture=files.config.architecture,
            model_type=str(files.source.get("model_type") or ""),
            releases=config.memory.saver,
            num_labels=files.config.num_labels,
            labels=label_names(files.source, files.config.num_labels),
            hidden_size=files.config.hidden_size,
            collectives=self._collectives.description,
            experts=files.config.expert_facts,
            keeps_routes=config.return_routed_experts,
        )

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Queue one step plan. On a GPU this returns before the step ran; the next one may
        be queued behind it at once, since tokens go from step to step on the device.

        With `StepPlan.masked` rows the forward pass is queued, and `mask` has to come before
        anything else; another plan in its place gives the step up.
        """
        self._masked = None
        self._profiler.before(plan.step)
        try:
            return self._launch(plan)
        finally:
            self._profiler.after()

    @torch.inference_mode()
    def mask(self, masks: StepMasks) -> None:
        """Queue the sampling of the step that waits for it."""
        step, self._masked = self._masked, None
        assert step is not None, f"no step waits for the masks of step {masks.step}"
        step.mask(masks)

    @torch.inference_mode()
    def _launch(self, plan: StepPlan) -> LaunchedStep:
        if plan.route_reads:
            self._occupancy.require("kv_cache")
        routes = self._pools.read(plan)
        if not plan.route_reads or len(plan.slots):
            self._occupancy.require_all()
            self._weights.session.require_servable()
        if not len(plan.slots):
            # Nothing to compute, and by a rank of its own copy nothing to take part in.
            return PendingStep(plan.step, routes=routes)
        step = self._queue(plan)
        return step if routes is None else step.with_routes(routes)

    def _queue(self, plan: StepPlan) -> LaunchedStep:
        """Queue what a plan computes."""
        if plan.sources is not None and self._drafter is not None:
            self._drafter.enter(plan.sources)
        self._table.enter(plan.new_rows)
        self._sampler.enter(plan.new_rows)
        self._eager.enter(plan.new_rows)
        self._table.set_pages(plan)
        self._pools.copy(plan)
        graphs = self._graphs
        if graphs is not None and not self._is_capturable(plan):
            graphs = None
        if graphs is not None and not len(plan.masked):
            return self._replay(graphs, plan)
        if self._verifier is not None and plan.draft_lens.any():
            assert not len(plan.masked), "a step that waits for masks verifies no drafts"
            return self._verifier.run(plan)
        if not len(plan.masked):
            return self._eager.forward(plan)(None)
        self._masked = MaskedStep(plan.step, self._forward(graphs, plan), self._sampler.masks)
        return self._masked

    def _forward(self, graphs: DecodeGraphs | None, plan: StepPlan) -> Sample:
        """Queue the forward pass of a step that is drawn later."""
        if graphs is None or not graphs.keeps_logits(len(plan.slots)):
            return self._eager.forward(plan)
        lens = plan.draft_lens if len(plan.draft_lens) else None
        computed = graphs.forward(plan.slots, plan.kv_lens, lens)
        return lambda masks: draw_late(plan, computed, self._sampler, self._table, masks)

    def _replay(self, graphs: DecodeGraphs, plan: StepPlan) -> PendingStep:
        """A decode step as one launch."""
        options, drafts = self._sampler.options(plan.slots), len(plan.draft_lens) > 0
        lens = plan.draft_lens if drafts else None
        drawn = graphs.run(plan.slots, plan.kv_lens, options, lens)
        runs, num_rows = None, len(plan.slots)
        if drafts:
            starts = np.arange(num_rows, dtype=np.int64) * drawn.width
            runs = Runs(starts, Fetch(drawn.counts))
        return PendingStep(plan.step, Fetch(drawn.sampled), num_rows=num_rows, runs=runs)

    def handle(self, command: EngineCommand) -> Reply:
        """Run one command that is no step; raises its typed error."""
        match command:
            case ReleaseMemory():
                return Reply(memory=[self._occupancy.release(command.tags)])
            case ResumeMemory():
                report = self._occupancy.resume(command.tags)
                if "weights" in report.tags and not self._keeps_weights:
                    self._weights.session.invalidate(
                        "the weights were released without a backup; publish a whole version"
                    )
                return Reply(memory=[report])
            case StartProfile():
                self._profiler.start(command)
                return Reply()
            case StopProfile():
                return Reply(traces=[self._profiler.stop()])
            case _:
                return self._weights.handle(command)

    def start(self, command: BesideSteps) -> PendingCommand:
        """Run a command that waits for others on a thread of its own, beside steps."""
        return self._weights.start(command)

    def cancel(self, reason: str, *, group: str = "") -> None:
        """Have transfers in progress end early; with `group`, only those that use it."""
        self._weights.cancel(reason, group=group)

    def receive(
        self, tensors: Iterable[tuple[str, torch.Tensor]], *, lasting: bool = False
    ) -> None:
        """Feed the open update from tensors of this process, each read before the next is asked
        for, or at the commit if all of them are `lasting`."""
        self._weights.session.receive(tensors, lasting=lasting)

    def abort(self) -> None:
        """Give up on the other ranks: what waits for them ends. From any thread."""
        self._collectives.abort()

    def close(self) -> None:
        """Leave the other ranks. Graphs go first: a group waits for those that captured it."""
        self._graphs = None
        self._weights.close()
        self._collectives.close()
        self._occupancy.close()

    def _is_capturable(self, plan: StepPlan) -> bool:
        if plan.query_lens.max() > 1 or not plan.samples.all():
            return False
        return self._sampler.is_capturable(plan.slots) and not self._scorer.wants(plan)

    def _build_drafter(self, config: EngineConfig) -> NgramDrafter:
        check_attention(self._attention.name)
        return NgramDrafter(config.speculative, self._table, kernel_backend(self._device))

    def _build_verifier(self, drafter: NgramDrafter) -> Verifier:
        return Verifier(
            self._model,
            self._table,
            self._sampler,
            self._attention,
            drafter,
            scratch_slot=self._scratch_slot,
            routes=self._pools.routes,
        )

    def _build_graphs(self, config: EngineConfig) -> DecodeGraphs | None:
        if not isinstance(self._attention, CapturableBackend):
            return None
        return DecodeGraphs(
            self._model,
            self._table,
            self._sampler,
            self._attention,
            max_rows=config.scheduler.max_running,
            max_verified=max_verified(config),
            scratch_slot=self._scratch_slot,
            drafter=self._drafter,
            routes=self._pools.routes,
            region=partial(self._occupancy.region, "cuda_graph"),
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
