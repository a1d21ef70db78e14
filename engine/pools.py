"""What one rank keeps of every token, sized by the memory there is: KV, and routes where they are
to be returned."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from engine.allocation import parameter_bytes
from engine.config import EngineConfig
from engine.graphs import num_kinds
from engine.kv.layout import head_layouts, page_bytes
from engine.kv.pool import KVPool
from engine.kv.route_pool import ReadRoutes, RoutePool, route_page_bytes
from engine.memory import Needs, StepSizes, graph_bytes, plan_memory, step_bytes
from engine.models.build import Model
from engine.occupancy import Occupancy
from engine.parallel.collectives import Collectives
from engine.parallel.mesh import Mesh
from engine.phases import check_phases
from engine.protocol import ExpertFacts, StepPlan
from engine.speculative.checks import max_verified
from engine.transfer import to_device

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pools:
    """kv: of every rank. routes: of the ranks that answer, where routes are kept."""

    kv: KVPool
    routes: RoutePool | None = None

    def tensors(self) -> Iterable[torch.Tensor]:
        """All that a page is part of."""
        yield from self.kv.tensors()
        if self.routes is not None:
            yield self.routes.tensor

    def read(self, plan: StepPlan) -> ReadRoutes | None:
        """Queue the reads of a plan, which come before anything that it writes."""
        if self.routes is None or not plan.route_reads:
            return None
        return self.routes.read(plan.route_reads)

    def copy(self, plan: StepPlan) -> None:
        """Queue the page copies of a plan."""
        if not len(plan.copy_src):
            return
        copies = np.stack([plan.copy_src, plan.copy_dst]).astype(np.int64)
        src, dst = to_device(copies, self.kv.device)
        self.kv.copy(src, dst)
        self.kv.spoilt.copied(plan.copy_src, plan.copy_dst)
        if self.routes is not None:
            self.routes.copy(src, dst)


@dataclass(frozen=True, kw_only=True)
class PoolBuilder:
    """Sizes and allocates the pools of one rank, once its weights are loaded.

    dtype: of the model. context: tokens of a sequence. num_scratch: pages of nobody's, beside those
    that are handed out. shadow_bytes: of a second copy of the weights that is to have room.
    """

    config: EngineConfig
    model: Model
    mesh: Mesh
    collectives: Collectives
    occupancy: Occupancy
    device: torch.device
    dtype: torch.dtype
    context: int
    num_scratch: int
    shadow_bytes: int

    def build(self) -> Pools:
        """Raises OutOfMemory, with the arithmetic."""
        config, cache, model = self.config, self.config.cache, self.model.config
        kinds = [layer.attention for layer in model.layers]
        layouts = head_layouts(kinds, dtype=self.dtype, kv_dtype=cache.kv_dtype, mesh=self.mesh)
        facts, needs = self._kept_routes(), self._needs()
        plan = plan_memory(
            cache,
            page_bytes=page_bytes(layouts, cache.page_size),
            route_bytes=0 if facts is None else route_page_bytes(facts, cache.page_size),
            needs=needs,
            device=self.device,
            context_length=self.context,
            max_running=config.scheduler.max_running,
        )
        logger.info("%s", plan.describe())
        if self.device.type == "cuda":
            device_bytes = torch.cuda.get_device_properties(self.device).total_memory
            check_phases(config.memory, needs, kv_bytes=plan.kv_bytes, device_bytes=device_bytes)
        # One plan goes to every rank, so every rank has the pages that the fullest has.
        num_pages = self.collectives.minimum(plan.num_pages) + self.num_scratch
        size, device = cache.page_size, self.device
        with self.occupancy.region("kv_cache"):
            kv = KVPool(layouts, num_pages=num_pages, page_size=size, device=device)
            routes = None
            if facts is not None:
                routes = RoutePool(facts, num_pages=num_pages, page_size=size, device=device)
        pools = Pools(kv, routes)
        self.occupancy.hold("kv_cache", pools.tensors())
        return pools

    def _kept_routes(self) -> ExpertFacts | None:
        """The experts whose routes this rank keeps: those of a rank that answers, which has the
        same ids as the others of its copy."""
        if not self.config.return_routed_experts or self.mesh.tp_rank != 0:
            return None
        return self.model.config.expert_facts

    def _needs(self) -> Needs:
        """What memory goes to beside the pools."""
        config, max_rows = self.config, max_verified(self.config)
        sizes, most = StepSizes.of(self.model.config), config.speculative.most
        has_graphs = self.num_scratch > 0 and config.cuda_graphs and self.device.type == "cuda"
        kinds = num_kinds(config.scheduler.max_running, max_rows, most) if has_graphs else 0
        return Needs(
            weights=parameter_bytes(self.model),
            workspace=step_bytes(config.scheduler, max_rows, sizes),
            graphs=graph_bytes(kinds, max_rows, sizes) if kinds else 0,
            trainer=config.memory.trainer_bytes,
            shadow=self.shadow_bytes,
        )
