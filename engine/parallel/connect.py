"""From the place of a rank to its device and its collectives."""

from __future__ import annotations

import os

import torch

from engine.config import ParallelConfig
from engine.errors import InvalidRequest
from engine.parallel.collectives import Collectives, NoCollectives
from engine.parallel.data_parallel import WholeCopy
from engine.parallel.gloo import GlooCollectives
from engine.parallel.mesh import Mesh
from engine.parallel.nccl import NcclCollectives
from engine.parallel.process_group import gloo_group, meeting_point, nccl_group
from engine.parallel.symmetric import map_or_not
from kernels.torch_compat import Store

_WATCHDOG_MARGIN_S = 60.0


def rank_device(device: torch.device, config: ParallelConfig, mesh: Mesh) -> torch.device:
    """The device of this rank, made the current one: GPU `base_gpu` + rank.

    A single rank with `base_gpu` 0 stays on the GPU its process has chosen, as a trainer
    under torchrun does. A GPU comes back with its number: threads that are started later have
    chosen none. Raises InvalidRequest when there are too few GPUs; every rank does.
    """
    if device.type != "cuda":
        return device
    if mesh.size == 1 and config.base_gpu == 0:
        return torch.device("cuda", torch.cuda.current_device())
    needed, found = config.base_gpu + mesh.size, torch.cuda.device_count()
    if needed > found:
        raise InvalidRequest(
            f"{_sizes(mesh)} from GPU {config.base_gpu} needs {needed} GPUs, {found} are visible",
            field=_field(mesh),
        )
    index = config.base_gpu + mesh.rank
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def connect(
    mesh: Mesh,
    device: torch.device,
    *,
    meeting_place: str,
    timeout_s: float,
    releasable: bool = False,
) -> Collectives:
    """Meet the other ranks of `mesh` at the file `meeting_place`, which is this group's alone.

    timeout_s: deadline of a collective. releasable: memory that collectives use will be released
    and resumed at its addresses. Raises InvalidRequest if there are other ranks but no
    place to meet them, EngineDead if one does not come.
    """
    if mesh.size == 1:
        return NoCollectives()
    if not meeting_place:
        raise InvalidRequest(
            f"{_sizes(mesh)} takes {mesh.size} processes; build the engine by "
            "rollout.launch, which starts them",
            field=_field(mesh),
        )
    store = meeting_point(meeting_place, mesh)
    host = _host(store, mesh, timeout_s)
    if mesh.tp_size == 1:
        return WholeCopy(host)
    if device.type != "cuda":
        return host
    if releasable:
        # Buffers that NCCL registers for a captured collective are not the same memory after a
        # release, and replays then hang.
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    # The replica's own deadline comes first: it can name the rank, the watchdog cannot.
    group = nccl_group(store, mesh, timeout_s + _WATCHDOG_MARGIN_S, device)
    return map_or_not(NcclCollectives(group, host), host, store, mesh, device)


def _host(store: Store, mesh: Mesh, timeout_s: float) -> GlooCollectives:
    """Sums among the ranks of a copy; what is agreed, among all."""
    updates = gloo_group(store, mesh.rank, mesh.size, "updates")
    everyone = gloo_group(store, mesh.rank, mesh.size)
    copy = everyone
    if mesh.dp_size > 1:
        copy = gloo_group(store, mesh.tp_rank, mesh.tp_size, f"copy {mesh.dp_rank}")
    return GlooCollectives(copy, timeout_s, updates=updates, everyone=everyone)


def _sizes(mesh: Mesh) -> str:
    tp = f"tp_size {mesh.tp_size}"
    return tp if mesh.dp_size == 1 else f"dp_size {mesh.dp_size} with {tp}"


def _field(mesh: Mesh) -> str:
    return "parallel.tp_size" if mesh.dp_size == 1 else "parallel.dp_size"
