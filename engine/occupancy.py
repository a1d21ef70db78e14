"""Which of an engine's memory is there, which is released, and in what order it comes back.

Tags are resumed in the order weights, kv_cache, cuda_graph, or together: so a trainer publishes
into the weights while the rest is still out. They are released in any order.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import get_args

import torch

from engine.config import MemoryConfig
from engine.errors import NO_SAVER, InvalidRequest, MemoryReleased, OutOfMemory, UnsupportedOption
from engine.host_backup import HostBackup
from engine.memory import gib
from engine.protocol import MemoryReport, MemoryTag
from engine.saver import MemorySaver, build_saver

_CACHE_MARGIN_BYTES = 1 << 30

ORDER: tuple[MemoryTag, ...] = get_args(MemoryTag)


class Occupancy:
    """The owner of released memory on one rank. Release and resume are idempotent.

    Tensors that come back without their values are zero: a KV page that no step wrote may be
    read under a mask, and zero times NaN is NaN.
    """

    def __init__(self, config: MemoryConfig, device: torch.device) -> None:
        """Raises InvalidRequest for options that do not go together, and UnsupportedOption if
        `config.saver` asks for what is not installed."""
        _check(config)
        self._device = device
        self._keep_weights = config.cpu_backup
        self._saver: MemorySaver | None = build_saver(device) if config.saver else None
        self._tensors: dict[MemoryTag, list[torch.Tensor]] = {tag: [] for tag in ORDER}
        self._out: dict[MemoryTag, int] = {}
        self._cached_bytes = 0
        self._backup: HostBackup | None = None

    @property
    def released(self) -> list[MemoryTag]:
        """Tags that are out, in the order to resume them."""
        return [tag for tag in ORDER if tag in self._out]

    def region(self, tag: MemoryTag, *, num_bytes: int = 0) -> AbstractContextManager[None]:
        """Allocations within can be released under `tag`; num_bytes: about how much."""
        if self._saver is None:
            return nullcontext()
        return self._saver.region(tag, num_bytes=num_bytes)

    def hold(self, tag: MemoryTag, tensors: Iterable[torch.Tensor]) -> None:
        """Name the tensors that were allocated in the region of `tag` and live on."""
        self._tensors[tag] += tensors
        if tag == "weights" and self._keep_weights and self._saver is not None:
            self._backup = HostBackup(self._tensors[tag])

    def require(self, tag: MemoryTag) -> None:
        """Raise MemoryReleased, saying what to resume, if `tag` is out."""
        if tag in self._out:
            first = ORDER[: ORDER.index(tag) + 1]
            names = ", then ".join(repr(name) for name in first if name in self._out)
            raise MemoryReleased(f"{tag} is released; resume {names} first", field=tag)

    def require_all(self) -> None:
        """Raise MemoryReleased unless a step could run."""
        if self._out:
            self.require(self.released[-1])

    def release(self, tags: Iterable[MemoryTag]) -> MemoryReport:
        """Give back the memory of `tags` (none: all) and return once it is free.

        Raises UnsupportedOption if the engine was built without `memory.saver`.
        """
        saver, asked = self._require_saver(), set(tags) or set(ORDER)
        started = time.perf_counter()
        self._synchronize()
        backup = self._backup if "weights" in asked.difference(self._out) else None
        if backup is not None:
            backup.save()
        freed: dict[str, int] = {}
        # Weights last: the others go while the weights are being copied.
        for tag in reversed(ORDER):
            if tag in asked and tag not in self._out:
                if tag == "weights" and backup is not None:
                    backup.wait()
                freed[tag] = self._out[tag] = self._release(saver, tag)
        self._cached_bytes = max(self._cached_bytes, self._empty_cache())
        return self._report(freed, started)

    def resume(self, tags: Iterable[MemoryTag]) -> MemoryReport:
        """Take back the memory of `tags` (none: all) and return once it can be used.

        Raises MemoryReleased when one that comes earlier in the order would stay out, and
        OutOfMemory, with numbers, when the device has no room; nothing has changed then.
        """
        saver, asked = self._require_saver(), set(tags) or set(ORDER)
        started = time.perf_counter()
        wanted = [tag for tag in ORDER if tag in asked and tag in self._out]
        self._check_order(wanted)
        self._empty_cache()
        self._check_room(wanted)
        taken: dict[str, int] = {}
        for tag in wanted:
            saver.resume(tag)
            taken[tag] = self._out.pop(tag)
            self._refill(tag)
        if self._backup is not None:
            self._backup.wait()
        if taken and not self._out:
            self._fill_cache()
        self._synchronize()
        return self._report(taken, started)

    def close(self) -> None:
        """Give all memory back: the engine is at its end."""
        if self._saver is not None:
            self._saver.close()

    def _release(self, saver: MemorySaver, tag: MemoryTag) -> int:
        tensors = self._tensors[tag]
        before = self._free_bytes()
        held = _storage_bytes(tensors)
        saver.release(tag, tensors)
        if self._device.type != "cuda":
            return held
        return max(0, self._free_bytes() - before)

    @torch.no_grad()
    def _refill(self, tag: MemoryTag) -> None:
        if tag == "weights" and self._backup is not None:
            self._backup.restore()
            return
        for tensor in self._tensors[tag]:
            tensor.zero_()

    def _require_saver(self) -> MemorySaver:
        if self._saver is None:
            raise UnsupportedOption(NO_SAVER, field="memory.saver")
        return self._saver

    def _check_order(self, wanted: Sequence[MemoryTag]) -> None:
        for tag in wanted:
            before = [t for t in ORDER[: ORDER.index(tag)] if t in self._out and t not in wanted]
            if before:
                raise MemoryReleased(
                    f"{before[0]} is still released and comes before {tag}; the order is "
                    f"{', then '.join(ORDER)}, or all at once",
                    field=tag,
                )

    def _check_room(self, wanted: Sequence[MemoryTag]) -> None:
        if self._device.type != "cuda" or not wanted:
            return
        needed, free = sum(self._out[tag] for tag in wanted), self._free_bytes()
        if needed > free:
            parts = " + ".join(f"{tag} {gib(self._out[tag])}" for tag in wanted)
            raise OutOfMemory(
                f"resuming takes {parts} = {gib(needed)}, and {gib(free)} of the device are free; "
                "free what the trainer holds there and resume again",
                field=wanted[-1],
            )

    def _report(self, moved: dict[str, int], started: float) -> MemoryReport:
        return MemoryReport(
            tags=moved,
            used_bytes=self._used_bytes(),
            seconds=time.perf_counter() - started,
        )

    def _used_bytes(self) -> int:
        """What torch holds on the device; the driver's own context comes on top."""
        if self._device.type != "cuda":
            return sum(_storage_bytes(tensors) for tensors in self._tensors.values())
        return torch.cuda.memory_reserved(self._device) - sum(self._out.values())

    def _free_bytes(self) -> int:
        if self._device.type != "cuda":
            return 0
        return int(torch.cuda.mem_get_info(self._device)[0])

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _empty_cache(self) -> int:
        """Give back what torch's allocator keeps for later; returns how many bytes."""
        if self._device.type != "cuda":
            return 0
        before = torch.cuda.memory_reserved(self._device)
        torch.cuda.empty_cache()
        return before - torch.cuda.memory_reserved(self._device)

    def _fill_cache(self) -> None:
        """Take what the release emptied as one block, of which the next step's activations are
        cut: otherwise that step waits for the driver once for each (8 times, 12 ms in all, for
        the prefill of 6,400 tokens on an H200)."""
        if 0 < self._cached_bytes < self._free_bytes() - _CACHE_MARGIN_BYTES:
            torch.empty(self._cached_bytes, dtype=torch.uint8, device=self._device)
        self._cached_bytes = 0


def _check(config: MemoryConfig) -> None:
    if config.cpu_backup and not config.saver:
        raise InvalidRequest(
            "memory.cpu_backup keeps weights that are released, which takes memory.saver; turn "
            "it on as well",
            field="memory.cpu_backup",
        )
    if config.trainer_bytes < 0:
        raise InvalidRequest(
            f"memory.trainer_bytes is {config.trainer_bytes}; give 0 or more",
            field="memory.trainer_bytes",
        )


def _storage_bytes(tensors: Sequence[torch.Tensor]) -> int:
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())
