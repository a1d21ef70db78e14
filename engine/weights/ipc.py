"""Tensors from memory of another process: our own payloads, and the pickles of SGLang's
trainers.

Lent tensors are read in place by the commit. What lies in shared memory of the host is copied
into memory of this process, lent or not: its owner could cut it short. Everything else is copied
before the reply, since the sender may overwrite it as soon as it has that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import msgspec
import torch

from engine.errors import (
    InvalidRequest,
    ManifestMismatch,
    SlipstreamError,
    UnsupportedOption,
)
from engine.numerics import dtype_name
from engine.parallel.mesh import Mesh
from engine.protocol import (
    IpcBuffer,
    IpcPayload,
    IpcTensor,
    ReceiveIpc,
    TensorPiece,
    decode,
    piece_bytes,
)
from engine.transfer import wait_for
from engine.weights import layouts, shared_memory
from engine.weights.helpers import nothing
from engine.weights.lane import Look
from engine.weights.mapping import MappedBuffers
from engine.weights.session import UpdateSession
from engine.weights.staging import Arrived
from engine.weights.unpickle import FlattenedTensorMetadata, restricted_loads

Named = tuple[str, torch.Tensor]


class IpcReceiver:
    """Runs `ReceiveIpc` for one rank, and keeps what it has mapped."""

    def __init__(self, session: UpdateSession, device: torch.device, mesh: Mesh) -> None:
        self._session = session
        self._mesh = mesh
        self._buffers = MappedBuffers(device)
        self._last: tuple[bytes, list[Named], list[TensorPiece]] | None = None

    def receive(self, command: ReceiveIpc, look: Look = nothing) -> None:
        """Take in the tensors of this rank's payload. look: called before each of them; what it
        raises ends the update.

        Raises InvalidRequest for a payload that cannot be read, ManifestMismatch for tensors
        that may not come, WeightUpdateError for memory that cannot be mapped; no rank has
        received anything then.
        """
        tensors: list[Named] = []
        pieces: list[TensorPiece] = []
        refusal: SlipstreamError | None = None
        try:
            update = self._session.require_owned("receive", command.owner)
            tensors, pieces = self._read(command, update.version)
            self._session.expect(pieces)
        except SlipstreamError as error:
            refusal = error
        if command.borrow and command.format == "native":
            self._session.lend(pieces, tensors, refusal)
            return
        with self._session.receiving(pieces, refusal):
            self._session.feed(_looking(pieces, tensors, look), lasting=False)
            _synchronize(tensors)

    def close(self) -> None:
        """Unmap what trainers lent. Idempotent."""
        self._last = None
        self._buffers.close()

    def _read(self, command: ReceiveIpc, version: int) -> tuple[list[Named], list[TensorPiece]]:
        data = self._mine(command.payloads)
        match command.format:
            case "native":
                return self._read_native(data, version)
            case "sglang":
                tensors = _read_named(data, self._mesh)
            case "sglang_bucket":
                tensors = _read_bucket(data)
            case _:
                raise UnsupportedOption(
                    f"IPC payloads of format {command.format!r} are not served; use NCCL",
                    field="format",
                )
        return tensors, [_piece(name, tensor) for name, tensor in tensors]

    def _mine(self, payloads: Sequence[bytes]) -> bytes:
        return payloads[_place(len(payloads), self._mesh)]

    def _read_native(self, data: bytes, version: int) -> tuple[list[Named], list[TensorPiece]]:
        try:
            payload: IpcPayload = decode(data, IpcPayload)
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"no IPC payload: {error}", field="payloads") from error
        for buffer in payload.buffers:
            if buffer.kind == "shm":
                shared_memory.require(buffer)
        mapped = self._buffers.open([b for b in payload.buffers if b.kind == "cuda"], version)
        # A trainer that lends its tensors sends one payload every time.
        if self._last is not None and self._last[0] == data:
            return self._last[1], self._last[2]
        pieces = [TensorPiece(t.name, t.dtype, t.shape) for t in payload.tensors]
        # Before memory is taken for any of them.
        self._session.expect(pieces)
        at = iter(mapped)
        buffers = [next(at) if b.kind == "cuda" else b for b in payload.buffers]
        tensors = [(tensor.name, _view(tensor, buffers)) for tensor in payload.tensors]
        self._last = (
            (data, tensors, pieces) if _are_views(payload.tensors, tensors, buffers) else None
        )
        return tensors, pieces


def _looking(
    pieces: Sequence[TensorPiece], tensors: Sequence[Named], look: Look
) -> Iterator[Arrived]:
    for piece, (_, tensor) in zip(pieces, tensors, strict=True):
        look()
        yield piece, tensor.reshape(-1)


def _piece(name: str, tensor: torch.Tensor) -> TensorPiece:
    return TensorPiece(name, dtype_name(tensor.dtype), list(tensor.shape))


def _are_views(
    entries: Sequence[IpcTensor],
    tensors: Sequence[Named],
    buffers: Sequence[torch.Tensor | IpcBuffer],
) -> bool:
    """Whether all of the tensors are the sender's memory itself."""
    for entry, (_, tensor) in zip(entries, tensors, strict=True):
        held = buffers[entry.buffer]
        if isinstance(held, IpcBuffer) or tensor.data_ptr() != held.data_ptr() + entry.offset:
            return False
    return True


def _view(tensor: IpcTensor, buffers: Sequence[torch.Tensor | IpcBuffer]) -> torch.Tensor:
    """A tensor inside its mapped buffer; a copy where it does not start at a multiple of its
    element, and of what lies in shared memory of the host."""
    dtype = layouts.torch_dtype(tensor.dtype, tensor.name)
    size = piece_bytes(TensorPiece(tensor.name, tensor.dtype, tensor.shape))
    if not 0 <= tensor.buffer < len(buffers):
        raise ManifestMismatch(
            f"{tensor.name} lies in buffer {tensor.buffer} of {len(buffers)}", field=tensor.name
        )
    held = buffers[tensor.buffer]
    num_bytes = held.size if isinstance(held, IpcBuffer) else held.numel()
    if not 0 <= tensor.offset <= num_bytes - size:
        raise ManifestMismatch(
            f"{tensor.name} ends beyond its buffer of {num_bytes} bytes", field=tensor.name
        )
    if isinstance(held, IpcBuffer):
        return shared_memory.read(held, tensor.offset, size).view(dtype).view(tensor.shape)
    part = held[tensor.offset : tensor.offset + size]
    if tensor.offset % dtype.itemsize:
        part = part.clone()
    return part.view(dtype).view(tensor.shape)


def _place(count: int, mesh: Mesh) -> int:
    """Which of `count` payloads is this rank's: they are one a rank, one for each rank of a copy of
    the model, as a trainer sends that knows of one copy, or one for all. Raises InvalidRequest."""
    if count == mesh.size:
        return mesh.rank
    if count == mesh.tp_size:
        return mesh.tp_rank
    if count == 1:
        return 0
    raise InvalidRequest(
        f"{count} payloads for {mesh.size} rank(s): send one a rank, or one for all",
        field="payloads",
    )


def _read_named(data: bytes, mesh: Mesh) -> list[Named]:
    """SGLang's default payload: pickled (name, tensor) pairs, or per-rank pickles of tensors."""
    pairs = restricted_loads(data)
    if not isinstance(pairs, Iterable):
        raise InvalidRequest("the payload is no list of (name, tensor)", field="payloads")
    tensors = []
    for pair in pairs:
        if not (isinstance(pair, Sequence) and len(pair) == 2):
            raise InvalidRequest("the payload is no list of (name, tensor)", field="payloads")
        name, value = pair
        per_rank = getattr(value, "values", None)
        if isinstance(per_rank, Sequence):
            value = restricted_loads(per_rank[_place(len(per_rank), mesh)])
        tensors.append((str(name), _as_tensor(str(name), value)))
    return tensors


def _read_bucket(data: bytes) -> list[Named]:
    """SGLang's flattened bucket: one tensor, and where in it each of its tensors lies.

    The tensor is uint8, unless the trainer is of a time before that: then it holds the values
    of all of them one after the other, in the dtype that `torch.cat` promoted them to.
    """
    bucket = restricted_loads(data)
    if not isinstance(bucket, dict) or not {"flattened_tensor", "metadata"} <= bucket.keys():
        raise InvalidRequest("the payload is no flattened bucket", field="payloads")
    flat = _as_tensor("flattened_tensor", bucket["flattened_tensor"]).reshape(-1)
    entries = bucket["metadata"]
    if not all(isinstance(entry, FlattenedTensorMetadata) for entry in entries):
        raise InvalidRequest("the bucket's metadata is none", field="payloads")
    return [_slice(flat, entry) for entry in entries]


def _slice(flat: torch.Tensor, entry: FlattenedTensorMetadata) -> Named:
    """The tensor that `entry` describes: its bytes, or its values in a wider float dtype.

    Raises ManifestMismatch for a slice that is neither.
    """
    name, dtype, shape = entry.name, entry.dtype, list(entry.shape)
    start, end, count = entry.start_idx, entry.end_idx, math.prod(shape)
    if not 0 <= start <= end <= flat.numel():
        raise ManifestMismatch(f"{name} ends beyond its bucket", field=name)
    part = flat[start:end]
    promoted = dtype != flat.dtype and flat.is_floating_point() and end - start == count
    if promoted and dtype.is_floating_point:
        return name, part.to(dtype).view(shape)
    # Integers that became floats may have been rounded, whatever their bytes add up to.
    if promoted or part.nbytes != count * dtype.itemsize:
        raise ManifestMismatch(
            f"{name} has {end - start} elements of {flat.dtype} in its bucket, which are not "
            f"{shape} of {dtype}: flatten the tensors as bytes, or a bucket per dtype",
            field=name,
        )
    part = part.view(torch.uint8)
    if part.data_ptr() % dtype.itemsize:
        part = part.clone()
    return name, part.view(dtype).view(shape)


def _as_tensor(name: str, value: object) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise InvalidRequest(f"{name} is a {type(value).__name__}, no tensor", field="payloads")
    return value.detach()


def _synchronize(tensors: Sequence[Named]) -> None:
    """Wait for the copies: the sender may overwrite its memory once it has the reply."""
    for device in {tensor.device for _, tensor in tensors}:
        wait_for(device)
