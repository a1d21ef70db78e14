"""NCCL itself, by ctypes, for both ends of a weight transfer: every wait has a deadline.

torch's NCCL process group ends the process when a peer is lost, be it the engine's or the
trainer's, and a trainer of vLLM's dialect has no such group at all. A raw communicator pairs
with both: what matters on the wire is the unique id and the order of operations. Communicators
are non-blocking (NCCL user guide, "Fault Tolerance"): a call that would wait returns at once
and is polled.

Memory and streams are plain addresses here, and the caller's current device is the rank's.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from engine.protocol.deadlines import ABORT_S

UNIQUE_ID_BYTES = 128

_SUCCESS, _IN_PROGRESS = 0, 7
_UINT8, _FLOAT32, _SUM = 1, 7, 0
_UNDEFINED = -(1 << 31)
_CONFIG_MAGIC, _CONFIG_VERSION = 0xCAFEBEEF, 21800
_POLLS_WITHOUT_SLEEP = 20
_POLLS_BETWEEN_LOOKS = 500
_POLL_S = 0.00005


Message = tuple[int, int, int]
"""An address, a number of bytes from there on, and the rank at the other end."""


class NcclError(RuntimeError):
    """A call that NCCL refused, or a communicator that broke."""


class UniqueId(ctypes.Structure):
    """ncclUniqueId: where the ranks of a communicator find each other."""

    _fields_ = [("internal", ctypes.c_byte * UNIQUE_ID_BYTES)]


class _Config(ctypes.Structure):
    """ncclConfig_t as of NCCL 2.18; later versions read the version and default the rest."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
        ("split_share", ctypes.c_int),
    ]


def _nonblocking_config() -> _Config:
    return _Config(
        ctypes.sizeof(_Config),
        _CONFIG_MAGIC,
        _CONFIG_VERSION,
        0,
        _UNDEFINED,
        _UNDEFINED,
        _UNDEFINED,
        None,
        _UNDEFINED,
    )


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The NCCL that torch has loaded, or that of the nvidia wheel. Raises NcclError without one."""
    tried = []
    for path in ("libnccl.so.2", *_wheel_paths()):
        try:
            loaded = ctypes.CDLL(path)
        except OSError as error:
            tried.append(str(error))
            continue
        _declare(loaded)
        return loaded
    raise NcclError(f"no libnccl.so.2 can be loaded: {'; '.join(tried)}")


def _wheel_paths() -> list[str]:
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else list(spec.submodule_search_locations or [])
    found = [Path(root) / "nccl" / "lib" / "libnccl.so.2" for root in roots]
    return [str(path) for path in found if path.is_file()]


def _declare(loaded: ctypes.CDLL) -> None:
    pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    signatures: dict[str, list[Any]] = {
        "ncclGetVersion": [ctypes.POINTER(integer)],
        "ncclGetUniqueId": [ctypes.POINTER(UniqueId)],
        "ncclCommInitRankConfig": [
            ctypes.POINTER(pointer),
            integer,
            UniqueId,
            integer,
            ctypes.POINTER(_Config),
        ],
        "ncclBroadcast": [pointer, pointer, size, integer, integer, pointer, pointer],
        "ncclAllReduce": [pointer, pointer, size, integer, integer, pointer, pointer],
        "ncclSend": [pointer, size, integer, integer, pointer, pointer],
        "ncclRecv": [pointer, size, integer, integer, pointer, pointer],
        "ncclGroupStart": [],
        "ncclGroupEnd": [],
        "ncclCommGetAsyncError": [pointer, ctypes.POINTER(integer)],
        "ncclCommAbort": [pointer],
    }
    for name, arguments in signatures.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, integer
    loaded.ncclGetErrorString.argtypes = [integer]
    loaded.ncclGetErrorString.restype = ctypes.c_char_p
    loaded.ncclGetLastError.argtypes = [pointer]
    loaded.ncclGetLastError.restype = ctypes.c_char_p


def new_unique_id() -> bytes:
    """A fresh unique id; the rank that makes it must take part in the communicator."""
    unique_id = UniqueId()
    _check(library().ncclGetUniqueId(ctypes.byref(unique_id)), None)
    return bytes(unique_id)


def _check(result: int, comm: ctypes.c_void_p | None) -> None:
    if result in (_SUCCESS, _IN_PROGRESS):
        return
    name = library().ncclGetErrorString(result).decode()
    detail = library().ncclGetLastError(comm).decode(errors="replace").strip()
    raise NcclError(f"NCCL: {name}{f' ({detail})' if detail else ''}")


class Communicator:
    """One rank of a non-blocking NCCL communicator.

    Built by all ranks at once; every method raises NcclError when it broke and TimeoutError
    past its deadline (of time.monotonic), after which only `abort` may be called. Addresses are
    of device memory, `stream` is a cudaStream_t. look: called now and then while waiting; what
    it raises ends the wait.
    """

    def __init__(
        self,
        unique_id: bytes,
        *,
        rank: int,
        world_size: int,
        deadline: float,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        if len(unique_id) != UNIQUE_ID_BYTES:
            raise NcclError(f"a unique id has {UNIQUE_ID_BYTES} bytes, not {len(unique_id)}")
        self._look = look
        self._aborting: threading.Thread | None = None
        self._comm = ctypes.c_void_p()
        self._config = _nonblocking_config()
        result = library().ncclCommInitRankConfig(
            ctypes.byref(self._comm),
            world_size,
            UniqueId.from_buffer_copy(unique_id),
            rank,
            ctypes.byref(self._config),
        )
        formed = False
        try:
            self._settle(result, deadline)
            formed = True
        finally:
            if not formed:
                # Nobody else will know of it.
                self.abort()

    def broadcast(
        self, address: int, num_bytes: int, *, root: int, stream: int, deadline: float
    ) -> None:
        """Queue the broadcast of `num_bytes` at `address` from rank `root`, in place."""
        result = library().ncclBroadcast(
            address, address, num_bytes, _UINT8, root, self._comm, stream
        )
        self._settle(result, deadline)

    def exchange(
        self,
        *,
        sends: Sequence[Message] = (),
        receives: Sequence[Message] = (),
        stream: int,
        deadline: float,
    ) -> None:
        """Queue messages to and from other ranks, which travel all at once. Those of one pair of
        ranks are matched in the order in which each end names them, in one call or several."""
        nccl = library()
        _check(nccl.ncclGroupStart(), self._comm)
        ended = False
        try:
            for address, num_bytes, rank in sends:
                _check(nccl.ncclSend(address, num_bytes, _UINT8, rank, self._comm, stream), None)
            for address, num_bytes, rank in receives:
                _check(nccl.ncclRecv(address, num_bytes, _UINT8, rank, self._comm, stream), None)
            ended = True
        finally:
            # Ended whatever was refused, or the thread's next call would be in the group still.
            result = nccl.ncclGroupEnd()
            if ended:
                self._settle(result, deadline)

    def sum_one(self, address: int, *, stream: int, deadline: float) -> None:
        """Queue an all-reduce of the float32 at `address`, in place."""
        result = library().ncclAllReduce(address, address, 1, _FLOAT32, _SUM, self._comm, stream)
        self._settle(result, deadline)

    def poll(self) -> bool:
        """Whether nothing is being set up. Raises NcclError when a peer was lost."""
        state = ctypes.c_int()
        _check(library().ncclCommGetAsyncError(self._comm, ctypes.byref(state)), self._comm)
        _check(state.value, self._comm)
        return state.value == _SUCCESS

    def abort(self) -> None:
        """End what is queued and free the communicator. Idempotent.

        Should NCCL hang here, it is left to itself after a while: the thread holds no lock. Until
        `is_freed`, kernels may still write to the memory of what was queued.
        """
        comm, self._comm = self._comm, ctypes.c_void_p()
        if comm:
            self._aborting = threading.Thread(
                target=library().ncclCommAbort, args=(comm,), name="nccl-abort", daemon=True
            )
            self._aborting.start()
            self._aborting.join(ABORT_S)

    @property
    def is_freed(self) -> bool:
        """Whether it was aborted and NCCL has come back from that."""
        return self._aborting is not None and not self._aborting.is_alive()

    def _settle(self, result: int, deadline: float) -> None:
        """Wait until a call has done its part; on a stream, that is until it is queued."""
        _check(result, self._comm)
        for attempt in range(1 << 62):
            if self.poll():
                return
            if time.monotonic() > deadline:
                raise TimeoutError
            if attempt > _POLLS_WITHOUT_SLEEP:
                time.sleep(_POLL_S)
            if attempt % _POLLS_BETWEEN_LOOKS == _POLLS_BETWEEN_LOOKS - 1:
                self._look()
