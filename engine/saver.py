"""Two ways to give the memory of live tensors back and to take it again.

On a GPU torch-memory-saver does it (https://github.com/fzyzcjy/torch_memory_saver): what is
allocated in a region sits on virtual addresses of its own, whose physical memory can be unmapped
and mapped again. Addresses stay, so CUDA graphs that captured them stay valid. On a CPU the
storages are resized.
"""

from __future__ import annotations

import importlib
import os
import uuid
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch

from engine.errors import UnsupportedOption
from engine.protocol import MemoryTag
from kernels.torch_compat import keep_for_ever

_BLOCK_BYTES = 4 << 30
_ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


class MemorySaver(Protocol):
    """Releases and resumes memory by tag. Neither call may repeat: `Occupancy` sees to it."""

    def region(self, tag: MemoryTag, *, num_bytes: int = 0) -> AbstractContextManager[None]:
        """Allocations of this thread belong to `tag` within. num_bytes: about what will be
        allocated, to be taken in one piece."""
        ...

    def release(self, tag: MemoryTag, tensors: Sequence[torch.Tensor]) -> None:
        """Give back the memory of the region, in which `tensors` live; contents are lost."""
        ...

    def resume(self, tag: MemoryTag) -> None:
        """Take the memory again; contents are undefined."""
        ...

    def close(self) -> None:
        """Give everything back for good: the tensors must not be touched again. Idempotent."""
        ...


class PlainSaver:
    """Resizes the storages of the tensors. Views of them stay views; addresses change."""

    def __init__(self) -> None:
        self._sizes: dict[MemoryTag, list[tuple[torch.UntypedStorage, int]]] = {}

    def region(self, tag: MemoryTag, *, num_bytes: int = 0) -> AbstractContextManager[None]:
        """Nothing to prepare."""
        return nullcontext()

    def release(self, tag: MemoryTag, tensors: Sequence[torch.Tensor]) -> None:
        """Resize every storage to nothing."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        self._sizes[tag] = [(storage, storage.nbytes()) for storage in storages.values()]
        for storage in storages.values():
            storage.resize_(0)

    def resume(self, tag: MemoryTag) -> None:
        """Resize every storage to what it was."""
        for storage, num_bytes in self._sizes.pop(tag):
            storage.resize_(num_bytes)

    def close(self) -> None:
        """The storages go with their tensors."""


class TorchMemorySaver:
    """Regions of torch-memory-saver in its "torch" mode, which needs no LD_PRELOAD.

    Its own state is one per process, so tags are made unique to this object. The library ends
    the process on a mistake: pausing twice, resuming without room, freeing outside a region. So
    its memory pools are never freed; `close` gives their memory back instead.
    """

    def __init__(self, device: torch.device) -> None:
        """Raises UnsupportedOption if the package is missing or cannot work here."""
        library = _load_library()
        _refuse_expandable_segments()
        library.hook_mode = "torch"
        self._device = device
        self._library = library
        self._prefix = f"slipstream-{uuid.uuid4().hex[:8]}"
        self._active: set[str] = set()
        # Freed pools would be freed outside a region.
        keep_for_ever(library)
        self._close = weakref.finalize(self, _pause_all, library, self._active)
        self._close.atexit = False

    @contextmanager
    def region(self, tag: MemoryTag, *, num_bytes: int = 0) -> Iterator[None]:
        """Allocations go to the memory pool of `tag`."""
        name = self._name(tag)
        self._active.add(name)
        with torch.cuda.device(self._device), self._library.region(tag=name):
            # Freed at once, these leave a few large blocks for all that follows: a release
            # takes time by the piece, and mapping again takes longer for very large ones.
            sizes = [min(_BLOCK_BYTES, num_bytes - at) for at in range(0, num_bytes, _BLOCK_BYTES)]
            blocks = [torch.empty(n, dtype=torch.uint8, device=self._device) for n in sizes]
            del blocks
            yield

    def release(self, tag: MemoryTag, tensors: Sequence[torch.Tensor]) -> None:
        """Unmap the physical memory."""
        self._library.pause(self._name(tag))
        self._active.discard(self._name(tag))

    def resume(self, tag: MemoryTag) -> None:
        """Map physical memory at the same addresses."""
        self._library.resume(self._name(tag))
        self._active.add(self._name(tag))

    def close(self) -> None:
        """Unmap what is mapped; addresses stay reserved."""
        self._close()

    def _name(self, tag: MemoryTag) -> str:
        return f"{self._prefix}-{tag}"


def build_saver(device: torch.device) -> MemorySaver:
    """The saver for `device`."""
    return TorchMemorySaver(device) if device.type == "cuda" else PlainSaver()


def _load_library() -> Any:
    try:
        entrypoint = importlib.import_module("torch_memory_saver.entrypoint")
    except ImportError as error:
        raise UnsupportedOption(
            f"memory.saver needs the torch-memory-saver package ({error}): pip install -e '.[gpu]'",
            field="memory.saver",
        ) from error
    return entrypoint.TorchMemorySaver()


def _refuse_expandable_segments() -> None:
    for name in _ALLOCATOR_SETTINGS:
        if "expandable_segments:True" in os.environ.get(name, ""):
            raise UnsupportedOption(
                f"memory.saver cannot work with {name}=expandable_segments:True; unset it",
                field="memory.saver",
            )


def _pause_all(library: Any, active: set[str]) -> None:
    """Give back the physical memory of an engine that is gone."""
    torch.cuda.synchronize()
    for name in active:
        library.pause(name)
