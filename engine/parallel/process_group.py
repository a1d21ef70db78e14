"""Process groups of a replica's own ranks.

They are built from torch's back ends directly: the default group may be a trainer's that
lives in the same process, and it is neither needed nor touched. All ranks of a replica are on
one host, so they meet at a file, which takes no port. torch types little of a back end's own
interface, hence `Any`.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch

from engine.errors import EngineDead
from engine.parallel.mesh import Mesh
from engine.protocol.deadlines import MEET_S
from kernels.torch_compat import FileStore, PrefixStore, Store, gloo_backend, nccl_backend

LOOPBACK = "127.0.0.1"


def meeting_point(path: str, mesh: Mesh) -> Store:
    """The store at a file that no other group has used; the first rank makes it."""
    store = FileStore(path, mesh.size)
    store.set_timeout(timedelta(seconds=MEET_S))
    return store


def gloo_group(store: Store, rank: int, size: int, name: str = "gloo") -> Any:
    """A connected group over loopback, of which this is `rank` of `size`; a rank whose process ends
    breaks it at once. Groups of several names may meet at one store.

    Raises EngineDead if a rank does not come in `MEET_S`.
    """
    place, timeout = PrefixStore(name, store), timedelta(seconds=MEET_S)
    try:
        return gloo_backend(place, rank, size, hostname=LOOPBACK, timeout=timeout)
    except RuntimeError as error:
        raise EngineDead(
            f"{size} ranks did not meet within {MEET_S:g} s: {error}", field="ranks"
        ) from error


def nccl_group(store: Store, mesh: Mesh, timeout_s: float, device: torch.device) -> Any:
    """The group of the ranks that share a copy of the model, on `device`, its communicator built.

    timeout_s: after which torch's own watchdog ends the process; replays of captured
    collectives are not among those it sees.
    """
    name, timeout = f"nccl {mesh.dp_rank}", timedelta(seconds=timeout_s)
    place = PrefixStore(name, store)
    return nccl_backend(place, mesh.tp_rank, mesh.tp_size, timeout=timeout, device=device)
