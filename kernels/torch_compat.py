"""What we use of torch, pickle and the interpreter that they do not offer to others.

Each entry stands here once, with why it is needed; `tests/kernels/test_torch_compat.py` holds, on
the torch at hand, that it is there and does what we need. No other file of ours names one.
It lies in `kernels` since both the engine and a trainer need it.
"""

from __future__ import annotations

import ctypes
import math
import pickle
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed as dist

# torch.distributed has these too; its types do not say so.
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    FileStore,
    HashStore,
    PrefixStore,
    ReduceScatterOptions,
    Store,
    TCPStore,
    _register_process_group,
    _SymmetricMemory,
    _unregister_process_group,
)
from torch.multiprocessing import reductions

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "AllgatherOptions",
    "AllreduceOptions",
    "FileStore",
    "HashStore",
    "PrefixStore",
    "PythonUnpickler",
    "ReduceScatterOptions",
    "Store",
    "TCPStore",
    "WeakStorage",
    "all_gather_flat",
    "copy_together",
    "export_cuda",
    "flash_attention_cpu",
    "gloo_backend",
    "import_cuda",
    "int8_product",
    "keep_for_ever",
    "largest_magnitudes",
    "local_part",
    "map_symmetric",
    "nccl_backend",
    "parameter_of",
    "ran_out_of_memory",
    "rebuild_cuda_tensor",
    "rebuild_tensor",
    "reduce_scatter_flat",
    "storage_bytes",
    "symmetric_empty",
    "unmap_symmetric",
    "weakly",
]

TensorT = TypeVar("TensorT", bound=torch.Tensor)

PythonUnpickler: Any = pickle._Unpickler
"""The unpickler written in Python, whose table of opcodes a subclass may narrow: the one in C
would let a payload set attributes of classes."""


def gloo_backend(store: Store, rank: int, size: int, *, hostname: str, timeout: timedelta) -> Any:
    """A connected gloo back end of `size` ranks that listens at `hostname`.

    The constructor that takes a timeout alone listens at whatever the host's name resolves to.
    Raises RuntimeError if a rank does not come in time.
    """
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=hostname)]
    options._timeout = timeout
    return gloo(store, rank, size, options)


def nccl_backend(
    store: Store, rank: int, size: int, *, timeout: timedelta, device: torch.device
) -> Any:
    """An NCCL back end with its communicator on `device` built: no first collective does it."""
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timeout
    group = nccl(store, rank, size, options)
    group.eager_connect_single_device(device)
    return group


def all_gather_flat(
    group: Any, out: torch.Tensor, x: torch.Tensor, options: AllgatherOptions
) -> Any:
    """Queue the gather of every rank's x [...] into out [ranks, ...] on a back end; returns its
    work. The public call takes registered groups alone, which belong to a trainer."""
    return group._allgather_base(out, x, options)


def reduce_scatter_flat(
    group: Any, out: torch.Tensor, x: torch.Tensor, options: ReduceScatterOptions
) -> Any:
    """Queue the sum over ranks of x [ranks, ...], of which each gets its part in out [...], on a
    back end; returns its work. As for `all_gather_flat`."""
    return group._reduce_scatter_base(out, x, options)


def symmetric_empty(num_words: int, device: torch.device) -> torch.Tensor:
    """Uninitialised int32 [num_words] on a GPU, which other processes of the host can map. Its
    memory is of no allocator of torch's: what releases theirs leaves it alone. Raises RuntimeError
    where there is no such memory."""
    return _SymmetricMemory.empty_strided_p2p((num_words,), (1,), torch.int32, device)


def map_symmetric(
    tensor: torch.Tensor, name: Any, store: Store, rank: int, size: int
) -> tuple[list[int], Any]:
    """Map the `symmetric_empty` of every rank: (their addresses here, by rank; what keeps them
    mapped). Every rank calls it with a tensor of the same size.

    name: a string that this process has named no group by. The public call looks up a registered
    group, which belongs to a trainer. Raises RuntimeError where a rank cannot be reached, or does
    not come within the store's timeout.
    """
    group: Any = dist.ProcessGroup(store, rank, size)
    # One torch looks for the store here, another there.
    _register_process_group(name, group)
    _SymmetricMemory.set_group_info(name, rank, size, store)
    handle: Any = _SymmetricMemory.rendezvous(tensor, name)
    return list(handle.buffer_ptrs), (group, handle)


def unmap_symmetric(name: Any) -> None:
    """Forget the group of `map_symmetric`; its memory stays mapped as long as what keeps it, and
    the tensor."""
    _unregister_process_group(name)


def export_cuda(storage: torch.UntypedStorage) -> tuple[Any, ...]:
    """What another process maps the storage by: (device, handle, size, offset, reference handle,
    reference offset, event, whether to wait for it). Raises RuntimeError for memory that cannot
    be shared."""
    found: tuple[Any, ...] = storage._share_cuda_()
    return found


def import_cuda(device: int, *shared: Any) -> torch.UntypedStorage:
    """Map on `device` what `export_cuda` gave in another process, without the device it names.
    Raises RuntimeError where the driver cannot."""
    return torch.UntypedStorage._new_shared_cuda(device, *shared)


class WeakStorage(Protocol):
    """A reference to a storage that does not keep its memory."""

    cdata: int

    def expired(self) -> bool:
        """Whether the storage is gone."""
        ...


def weakly(storage: torch.UntypedStorage) -> WeakStorage:
    """A weak reference as torch's own cache of shared storages holds them; Python's own ends with
    the Python object, while tensors may still hold the memory."""
    return reductions.StorageWeakRef(storage)


def rebuild_tensor(storage: Any, offset: int, size: Any, stride: Any) -> torch.Tensor:
    """What a pickle of a tensor calls: a view of a typed storage. offset, stride: in elements."""
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


def rebuild_cuda_tensor(*arguments: Any) -> torch.Tensor:
    """What a pickle of a tensor in shared GPU memory calls, with the same arguments."""
    return reductions.rebuild_cuda_tensor(*arguments)


def storage_bytes(storage: Any) -> int:
    """Bytes of a typed storage, as pickles of tensors have them. Its own `nbytes` warns."""
    return int(storage._untyped_storage.nbytes())


def parameter_of(kind: type[TensorT], data: torch.Tensor) -> TensorT:
    """A tensor of a subclass over the memory of `data`, without a gradient. The public
    `as_subclass` makes no leaf that a module takes for a parameter."""
    made: TensorT = torch.Tensor._make_subclass(kind, data, False)
    return made


def local_part(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape, first index in every dimension) of what this rank holds of a sharded tensor."""
    # Here: importing DTensor takes longer than all else an engine needs of this file.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )


def flash_attention_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(attention, log of the sum of exponentials) over [batch, heads, tokens, dim] on a CPU, with
    no causal mask but what `bias` holds. The public function does not return the second."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = attention(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
    return out, lse


def copy_together(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy many small tensors in few kernels, in the order of the current stream."""
    torch._foreach_copy_(list(targets), list(sources), non_blocking=True)


def int8_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int8 [R, I] @ int8 [O, I].T -> int32 [R, O] on a GPU, exact; R above 16, I and O multiples
    of 8. The public product takes no integers there."""
    return torch._int_mm(x, weight.t())


def largest_magnitudes(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The largest magnitude of each tensor, NaN if any is NaN, in few kernels."""
    return list(torch._foreach_norm(list(tensors), math.inf))


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that no memory was found. On the host that has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def keep_for_ever(thing: object) -> None:
    """Take one reference that nobody drops: a thread of C++ may still be in it when the
    interpreter ends, and destructing it under that thread would end the process."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
