"""The memory planner: how many KV pages fit, with its arithmetic in every refusal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import CacheConfig, SchedulerConfig
from engine.errors import OutOfMemory
from engine.models.config import ModelConfig

# A CPU's memory is shared with the trainer and everything else on the machine.
CPU_SHARE = 0.25
_GRAPH_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What one rank's memory goes to beside the KV pool, in bytes.

    weights: allocated before the pool is planned, so that free memory is what is left.
    workspace: largest activations of one step. graphs: what CUDA graphs keep. trainer: the share
    of a trainer beside the engine while that is awake. shadow: a second copy of the weights.
    """

    weights: int = 0
    workspace: int = 0
    graphs: int = 0
    trainer: int = 0
    shadow: int = 0

    @property
    def to_keep(self) -> int:
        """What has to stay free once the pool is allocated."""
        return self.workspace + self.graphs + self.trainer + self.shadow

    def describe(self) -> str:
        """What is kept free, term by term."""
        terms = {
            "activations": self.workspace,
            "CUDA graphs": self.graphs,
            "the trainer": self.trainer,
            "a shadow of the weights": self.shadow,
        }
        kept = [f"{gib(size)} for {name}" for name, size in terms.items() if size]
        return f"weights take {gib(self.weights)}, kept free: {', '.join(kept) or 'nothing'}"


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How the KV pool was sized. All sizes in bytes. page_bytes: of all that a page has, of which
    route_bytes are routes."""

    num_pages: int
    page_bytes: int
    route_bytes: int
    free_bytes: int
    needs: Needs
    reason: str

    @property
    def kv_bytes(self) -> int:
        """Bytes of the pool."""
        return self.num_pages * self.page_bytes

    def describe(self) -> str:
        """One line with the whole arithmetic, for the log and for refusals."""
        routes = f", {self.route_bytes} of them routes," if self.route_bytes else ""
        return (
            f"KV pool: {self.num_pages} pages x {self.page_bytes} B{routes} = {gib(self.kv_bytes)} "
            f"({self.reason}); free {gib(self.free_bytes)}; {self.needs.describe()}"
        )


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """What the activations of a step are as large as, in elements.

    outputs: logits or scores of a row. experts_size: of all experts of a token, their inner sizes
    and hidden states together; 0 where there are none.
    """

    hidden_size: int
    intermediate_size: int
    outputs: int
    experts_size: int = 0

    @classmethod
    def of(cls, model: ModelConfig) -> StepSizes:
        """Those of a model."""
        experts, experts_size = model.experts, 0
        if experts is not None:
            inner = experts.intermediate_size + model.hidden_size
            experts_size = experts.routing.top_k * inner
        return cls(
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            outputs=model.num_labels or model.vocab_size,
            experts_size=experts_size,
        )

    @property
    def token_bytes(self) -> int:
        """Of a token: hidden states and MLP as if they were float32, and what goes through its
        experts in 16 bits."""
        return 4 * (8 * self.hidden_size + 3 * self.intermediate_size) + 2 * self.experts_size


def step_bytes(config: SchedulerConfig, max_rows: int, sizes: StepSizes) -> int:
    """Estimate of the largest activations of one step: hidden states, MLP and experts of every
    token, and the logits of every row in float32, three times over. max_rows: drafts among them."""
    num_tokens = max(config.max_step_tokens, max_rows)
    return num_tokens * sizes.token_bytes + 3 * 4 * max_rows * sizes.outputs


def graph_bytes(num_graphs: int, max_rows: int, sizes: StepSizes) -> int:
    """Estimate of what CUDA graphs keep: one pool as large as the largest decode step, which
    all share, and the nodes of each."""
    return num_graphs * _GRAPH_BYTES + max_rows * (sizes.token_bytes + 4 * sizes.outputs)


def plan_memory(
    cache: CacheConfig,
    *,
    page_bytes: int,
    route_bytes: int = 0,
    needs: Needs,
    device: torch.device,
    context_length: int,
    max_running: int,
) -> MemoryPlan:
    """Size the KV pool after the weights are loaded.

    page_bytes: K and V of one page over all layers; route_bytes: its routes. Raises OutOfMemory
    when not even one sequence of `context_length` tokens fits, or when what was asked for does not.
    """
    _empty_cache(device)
    free = free_bytes(device)
    wanted, reason = _wanted_bytes(cache, free, needs, device)
    page_bytes += route_bytes
    if cache.num_pages is not None:
        num_pages, reason = cache.num_pages, f"num_pages={cache.num_pages}"
    else:
        # More than every slot at full length could never be used.
        most = max_running * -(-context_length // cache.page_size)
        num_pages = min(wanted // page_bytes, most)
    plan = MemoryPlan(
        num_pages=num_pages,
        page_bytes=page_bytes,
        route_bytes=route_bytes,
        free_bytes=free,
        needs=needs,
        reason=reason,
    )
    _refuse_if_it_does_not_fit(plan, cache)
    return plan


def require_room(num_bytes: int, device: torch.device) -> None:
    """Raise OutOfMemory, with numbers, unless the weights fit at all."""
    _empty_cache(device)
    free = free_bytes(device)
    if num_bytes > free:
        raise OutOfMemory(
            f"the weights take {gib(num_bytes)}, and {gib(free)} of {device} are free; free "
            "memory there, or use a smaller model or more ranks",
            field="model",
        )


def free_bytes(device: torch.device) -> int:
    """Memory of `device` that nobody holds. What torch caches is held: torch cannot tell what of
    it belongs to regions that only their own tag may use."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 8 << 30


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.empty_cache()


def gib(num_bytes: int) -> str:
    """'1.50 GiB'."""
    return f"{num_bytes / 2**30:.2f} GiB"


def _wanted_bytes(
    cache: CacheConfig, free: int, needs: Needs, device: torch.device
) -> tuple[int, str]:
    if cache.memory_bytes is not None:
        return cache.memory_bytes, f"memory_bytes={cache.memory_bytes}"
    share = cache.memory_fraction * (1.0 if device.type == "cuda" else CPU_SHARE)
    wanted = max(0, int((free - needs.to_keep) * share))
    return wanted, f"{share:.2f} of free memory less what is kept free"


def _refuse_if_it_does_not_fit(plan: MemoryPlan, cache: CacheConfig) -> None:
    if plan.num_pages < 2:
        raise OutOfMemory(
            f"no room for a KV cache. {plan.describe()}. Free memory, raise memory_bytes or "
            "memory_fraction, lower memory.trainer_bytes, or choose a smaller model",
            field="cache.memory_bytes",
        )
    if plan.kv_bytes + plan.needs.to_keep > plan.free_bytes:
        asked = "num_pages" if cache.num_pages is not None else "memory_bytes"
        raise OutOfMemory(
            f"cache.{asked} asks for more than there is. {plan.describe()}",
            field=f"cache.{asked}",
        )
