"""Read the pickles that external trainers send, by an allow-list.

A pickle names what it wants called; here every name on the list stands for a function or class
of this file, and any other name refuses the payload. So nothing of a payload is ever imported,
and a payload does not need the package it was written with. The list covers what SGLang's and
vLLM's weight dialects carry: bucket metadata, tensors in CUDA IPC memory,
tensors whose bytes are in the pickle, and an NCCL id.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from engine.errors import InvalidRequest
from kernels.torch_compat import PythonUnpickler, rebuild_cuda_tensor, rebuild_tensor, storage_bytes

_NCCL_ID_BYTES = 128
_TRAINERS = frozenset({"sglang", "slime", "miles", "verl", "areal", "torchrl", "openrlhf", "vllm"})


@dataclass
class FlattenedTensorMetadata:
    """One tensor of a flattened bucket, as SGLang's class of this name has it.

    dtype: torch.dtype of the tensor. start_idx, end_idx: where it lies in the flattened tensor,
    in elements of that. numel: elements of the tensor.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


@dataclass
class LocalSerializedTensor:
    """One pickled tensor a rank: `values[tp_rank]` goes through `restricted_loads` again."""

    values: list[bytes]


@dataclass(frozen=True)
class NcclUniqueId:
    """The 128 bytes of an `ncclUniqueId`."""

    internal: bytes


def restricted_loads(data: bytes) -> Any:
    """The object of a payload; nothing outside the allow-list is called.

    A bucket comes back as {"flattened_tensor": tensor, "metadata": [FlattenedTensorMetadata]},
    other payloads as lists of (name, tensor or LocalSerializedTensor), an NCCL id as
    `NcclUniqueId`. Tensors in CUDA IPC memory are mapped, not copied.

    Raises InvalidRequest naming the class that is not on the list, or saying what is wrong with
    the payload.
    """
    try:
        return _Reader(data).load()
    except InvalidRequest:
        raise
    except _BROKEN as error:
        raise InvalidRequest(
            f"the payload cannot be read: {type(error).__name__}: {error}", field="payload"
        ) from error


_BROKEN = (
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
_DATA = (FlattenedTensorMetadata, LocalSerializedTensor)


@dataclass(frozen=True)
class _Name:
    """A class that payloads pass as an argument and nothing may call."""

    text: str


class _Reader(PythonUnpickler):
    """The unpickler of the standard library in Python, with some opcodes narrowed."""

    dispatch = dict(PythonUnpickler.dispatch)

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._num_bytes = len(data)

    def find_class(self, module: str, name: str) -> Any:
        """What `module.name` stands for."""
        found = _ALLOWED.get((module, name))
        if found is not None:
            return found
        if module.partition(".")[0] in _TRAINERS and name in _OF_TRAINERS:
            return _OF_TRAINERS[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise InvalidRequest(
            f"the payload names {module}.{name}, which is not on the list of what may be read",
            field=f"{module}.{name}",
        )

    def load_build(self) -> None:
        if type(self.stack[-2]) not in _DATA or not isinstance(self.stack[-1], dict):
            raise pickle.UnpicklingError("state for an object that takes none")
        fields = self.stack[-2].__dataclass_fields__.keys()
        if self.stack[-1].keys() - fields:
            raise pickle.UnpicklingError(f"unknown state for {type(self.stack[-2]).__name__}")
        super().load_build()

    def load_newobj(self) -> None:
        if self.stack[-2] not in _DATA:
            raise pickle.UnpicklingError("an object of a class that takes no instances")
        super().load_newobj()

    def load_bytearray8(self) -> None:
        # The standard library clears as much memory as the payload says it will fill.
        size = int.from_bytes(self.read(8), "little")
        if size > self._num_bytes:
            raise pickle.UnpicklingError(f"{size} bytes in a payload of {self._num_bytes}")
        self.append(bytearray(self.read(size)))

    def refuse(self) -> None:
        raise pickle.UnpicklingError("an opcode that no payload of the dialects has")

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    for _opcode in (
        pickle.NEWOBJ_EX,
        pickle.INST,
        pickle.OBJ,
        pickle.EXT1,
        pickle.EXT2,
        pickle.EXT4,
    ):
        dispatch[_opcode[0]] = refuse
    for _opcode in (pickle.PERSID, pickle.BINPERSID):
        dispatch[_opcode[0]] = refuse


def _size(values: tuple[int, ...] = ()) -> torch.Size:
    return torch.Size(values)


def _device(*arguments: Any) -> torch.device:
    return torch.device(*arguments)


def _ordered(pairs: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict(pairs)


def _storage_from_bytes(data: bytes) -> Any:
    """In place of torch's own, which would read the inner bytes as an unrestricted pickle."""
    return torch.load(io.BytesIO(data), weights_only=True)


def _encoded(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 write bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes written in {encoding!r}")
    return text.encode("latin1")


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    _check_bounds(storage_bytes(storage) // storage.dtype.itemsize, offset, size, stride)
    return rebuild_tensor(storage, offset, size, stride)


def _check_bounds(num_elements: int, offset: int, size: Any, stride: Any) -> None:
    """torch would grow a storage that is too small, by bytes nobody sent."""
    extents = list(zip(size, stride, strict=True))
    last = offset + sum((count - 1) * step for count, step in extents)
    legal = offset >= 0 and all(count >= 0 and step >= 0 for count, step in extents)
    if not legal or (last >= num_elements and all(count for count, _ in extents)):
        raise pickle.UnpicklingError(
            f"a tensor of shape {list(size)} at {offset} in a storage of {num_elements} elements"
        )


def _parameter(data: torch.Tensor, *_: Any) -> torch.Tensor:
    return data


def _cuda_tensor(*arguments: Any) -> torch.Tensor:
    """`torch.multiprocessing.reductions.rebuild_cuda_tensor`, the device by number or UUID."""
    _, size, stride, offset, _, dtype, device, *rest = arguments
    _check_bounds(rest[1] // dtype.itemsize, offset, size, stride)
    storage = torch.storage.TypedStorage
    own = _device_index(device)
    # No gradient, whatever the sender's tensor had.
    rest[3] = False
    return rebuild_cuda_tensor(torch.Tensor, size, stride, offset, storage, dtype, own, *rest)


def _device_index(device: int | str) -> int:
    """This process's number of the GPU that a sender names; other processes may count
    differently, so senders of the dialect give the UUID."""
    if not isinstance(device, str):
        return int(device)
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == device.removeprefix("GPU-"):
            return index
    raise InvalidRequest(
        f"the payload lies on GPU {device}, which this rank does not see; trainer and engine "
        "must share the GPU",
        field="device",
    )


def _ctypes_object(kind: _Name, state: tuple[Any, bytes]) -> NcclUniqueId:
    """In place of `_ctypes._unpickle`: the bytes of a structure, of the one kind there is."""
    internal = bytes(state[1])
    if kind != _NCCL_ID or len(internal) != _NCCL_ID_BYTES:
        raise pickle.UnpicklingError(f"{len(internal)} bytes of a ctypes structure")
    return NcclUniqueId(internal)


_NCCL_ID = _Name("ncclUniqueId")
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered,
    ("_codecs", "encode"): _encoded,
    ("_ctypes", "_unpickle"): _ctypes_object,
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
    ("torch", "Tensor"): _Name("torch.Tensor"),
    ("torch._tensor", "Tensor"): _Name("torch.Tensor"),
    ("torch.nn.parameter", "Parameter"): _Name("torch.nn.Parameter"),
    ("torch.storage", "TypedStorage"): _Name("torch.TypedStorage"),
    ("torch.storage", "UntypedStorage"): _Name("torch.UntypedStorage"),
    ("torch.storage", "_load_from_bytes"): _storage_from_bytes,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.multiprocessing.reductions", "rebuild_cuda_tensor"): _cuda_tensor,
}
_OF_TRAINERS: dict[str, Callable[..., Any] | _Name] = {
    "FlattenedTensorMetadata": FlattenedTensorMetadata,
    "LocalSerializedTensor": LocalSerializedTensor,
    "_rebuild_cuda_tensor_modified": _cuda_tensor,
    "ncclUniqueId": _NCCL_ID,
}
