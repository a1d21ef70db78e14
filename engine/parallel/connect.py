"""From the place of a rank to its device and its collectives."""

from __future__ import annotations

import os

import torch

from engine.config import ParallelConfig
from engine.errors import InvalidRequest
from engine.parallel.collectives import Collectives, NoCollectives
from engine.parallel.gloo import GlooCollectives
from engine.parallel.mesh import Mesh
from engine.parallel.nccl import NcclCollectives
from engine.parallel.process_group import gloo_group, meeting_point, nccl_group
from engine.parallel.symmetric import map_or_not

_WATCHDOG_MARGIN_S = 60.0


def rank_device(device: torch.device, config: ParallelConfig, mesh: Mesh) -> torch.device:
    """The device of this rank, made the current one: GPU `base_gpu` + rank.

    A single rank with `base_gpu` 0 stays on the GPU its process has chosen, as a trainer
    under torchrun does. A GPU comes back with its number: threads that are started later have
    chosen none. Raises InvalidRequest when there are too few GPUs; every rank does.
    """
    if device.type != "cuda":
        return device
    if mesh.tp_size == 1 and config.base_gpu == 0:
        return torch.device("cuda", torch.cuda.current_device())
    needed, found = config.base_gpu + mesh.tp_size, torch.cuda.device_count()
    if needed > found:
        raise InvalidRequest(
            f"tp_size {mesh.tp_size} from GPU {config.base_gpu} needs {needed} GPUs, {found} are "
            "visible",
            field="parallel.tp_size",
        )
    index = config.base_gpu + mesh.tp_rank
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
    if mesh.tp_size == 1:
        return NoCollectives()
    if not meeting_place:
        raise InvalidRequest(
            f"tp_size {mesh.tp_size} takes as many processes; build the engine by "
            "rollout.launch, which starts them",
            field="parallel.tp_size",
        )
    store = meeting_point(meeting_place, mesh)
    host = GlooCollectives(
        gloo_group(store, mesh), timeout_s, updates=gloo_group(store, mesh, "updates")
    )
    if device.type != "cuda":
        return host
    if releasable:
        # Buffers that NCCL registers for a captured collective are not the same memory after a
        # release, and replays then hang.
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    # The replica's own deadline comes first: it can name the rank, the watchdog cannot.
    group = nccl_group(store, mesh, timeout_s + _WATCHDOG_MARGIN_S, device)
    return map_or_not(NcclCollectives(group, host), host, store, mesh, device)
