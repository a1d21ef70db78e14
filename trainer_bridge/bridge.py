"""`push`: publish a trainer's weights as version v, in place.

docs/weight_update.md follows one push file by file. `push` makes its connection for one
update; a `Publisher` keeps it, which is what transports with a process group or mapped memory
want.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch

from engine.errors import UnsupportedOption
from engine.protocol import BeginUpdate, StagingMode, UpdateReport
from trainer_bridge.adapters.base import WeightSource
from trainer_bridge.adapters.fitting import source_of
from trainer_bridge.checksum import with_checksums
from trainer_bridge.stored import check_stored
from trainer_bridge.transports import disk, inproc
from trainer_bridge.transports.base import Carrier, publish
from trainer_bridge.transports.cuda_ipc import IpcCarrier
from trainer_bridge.transports.nccl import NcclCarrier
from trainer_bridge.update_target import LocalTarget, UpdateTarget

Transport = Literal["inproc", "disk", "delta", "nccl", "cuda_ipc"]


@dataclass(frozen=True, kw_only=True)
class PushReport:
    """What one push cost. Times in seconds.

    memcpy_seconds: a plain copy of the same bytes, measured beside it when asked for.
    """

    version: int
    num_tensors: int
    num_bytes: int
    seconds: float
    memcpy_seconds: float | None = None

    def __str__(self) -> str:
        rate = self.num_bytes / self.seconds / 1e9
        text = (
            f"version {self.version}: {self.num_tensors} tensors, {self.num_bytes / 1e6:.0f} MB "
            f"in {self.seconds * 1e3:.0f} ms ({rate:.1f} GB/s)"
        )
        if self.memcpy_seconds is None:
            return text
        ratio = self.seconds / self.memcpy_seconds
        return f"{text}; memcpy {self.memcpy_seconds * 1e3:.0f} ms, ratio {ratio:.2f}"


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """How a publisher reaches its engines.

    folder: of 'disk' and 'delta'; a temporary one if None. address, port: where the trainer
    listens for 'nccl' (gloo on a CPU); port 0 takes a free one. checksums: have the engines
    verify every tensor's bits. stored: after the commit, compare what every rank stores with what
    these weights give in the engine's dtype and scheme (ChecksumMismatch). mode: see
    `BeginUpdate`. timeout_s: for one update.
    """

    transport: Transport = "inproc"
    folder: str | Path | None = None
    address: str = "127.0.0.1"
    port: int = 0
    group: str = "slipstream"
    bucket_bytes: int = 256 << 20
    checksums: bool = False
    stored: bool = False
    mode: StagingMode = "auto"
    timeout_s: float = 300.0


class Publisher:
    """Publishes one trainer's weights to the same engines, update after update.

    model: a transformers model or any module whose parameter names are the Hugging Face ones,
    a DeepSpeedEngine or FSDP2 module of one, or a `WeightSource`.
    targets: replicas of this process, or `HttpTarget`s.
    """

    def __init__(
        self,
        model: torch.nn.Module | WeightSource,
        targets: Sequence[UpdateTarget],
        options: PushOptions | None = None,
    ) -> None:
        self.options = options or PushOptions()
        self._source = (
            source_of(model, bucket_bytes=self.options.bucket_bytes)
            if isinstance(model, torch.nn.Module)
            else model
        )
        self._targets = targets
        self._carrier: Carrier | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def push(self, version: int, *, measure_memcpy: bool = False) -> PushReport:
        """Publish the weights as they are now.

        version: greater than the version that serves now.

        Requests in flight continue across the push; their tokens carry the version that sampled
        each. Raises ManifestMismatch, naming the tensor, when the trainer's parameters are not
        the engine's, and another WeightUpdateError otherwise; the old version then keeps serving
        (after an in-place update, none does until a whole one was published). With several
        engines every error names the one that it is of, and an engine that does not answer
        stops the push for all of them: leave it out of `targets` to go on without it.
        FleetDivided says that some engines serve `version` and others do not: push the same
        version again, with the same weights, and it goes to those left behind. After any
        error the publisher can be used again; it connects anew where it has to.
        """
        started = time.perf_counter()
        report = self._publish(self._begin(version))
        for target in self._targets if self.options.stored else ():
            check_stored(self._source, target)
        seconds = time.perf_counter() - started
        return PushReport(
            version=version,
            num_tensors=report.num_tensors,
            num_bytes=report.num_bytes,
            seconds=seconds,
            memcpy_seconds=self._memcpy_seconds() if measure_memcpy else None,
        )

    def close(self) -> None:
        """Leave the engines. Idempotent."""
        carrier, self._carrier = self._carrier, None
        if carrier is not None:
            carrier.close()
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _memcpy_seconds(self) -> float | None:
        """None for a source that gathers: its tensors are not there all at once."""
        if not self._source.lasting:
            return None
        return memcpy_seconds(list(self._source.tensors()))

    def _begin(self, version: int) -> BeginUpdate:
        specs = self._source.specs()
        if self.options.checksums:
            specs = with_checksums(specs, self._source.tensors())
        return BeginUpdate(
            version=version,
            manifest=specs,
            mode=self.options.mode,
            timeout_s=self.options.timeout_s,
        )

    def _publish(self, begin: BeginUpdate) -> UpdateReport:
        if self.options.transport == "inproc":
            return self._publish_inproc(begin)
        if self._carrier is None:
            self._carrier = self._make_carrier()
        return publish(self._carrier, begin, self._source)

    def _publish_inproc(self, begin: BeginUpdate) -> UpdateReport:
        if len(self._targets) != 1:
            raise UnsupportedOption(
                "'inproc' reaches one engine of this process; use 'cuda_ipc' or 'nccl'",
                field="transport",
            )
        target = cast(LocalTarget, self._targets[0])
        return inproc.send(begin, self._source, target)

    def _make_carrier(self) -> Carrier:
        options = self.options
        if options.transport == "nccl":
            return NcclCarrier(
                self._targets,
                device=self._device(),
                address=options.address,
                port=options.port,
                name=options.group,
                bucket_bytes=options.bucket_bytes,
                timeout_s=options.timeout_s,
            )
        if options.transport == "cuda_ipc":
            return IpcCarrier(
                self._targets, device=self._device(), bucket_bytes=options.bucket_bytes
            )
        return disk.DiskCarrier(self._targets, self._folder(), delta=options.transport == "delta")

    def _folder(self) -> Path:
        if self.options.folder is not None:
            return Path(self.options.folder)
        self._scratch = tempfile.TemporaryDirectory(prefix="weights-")
        return Path(self._scratch.name)

    def _device(self) -> torch.device:
        _, first = next(iter(self._source.tensors()))
        return first.device


def push(
    model: torch.nn.Module | WeightSource,
    version: int,
    replica: UpdateTarget,
    *,
    transport: Transport = "inproc",
    folder: str | Path | None = None,
    measure_memcpy: bool = False,
) -> PushReport:
    """Publish every parameter of `model` to one engine as `version`: see `Publisher.push`.

    transport: 'inproc' for an engine of this process, 'cuda_ipc' for one on the same GPU,
        'nccl' for one on another, 'disk' for any that sees `folder`.
    """
    options = PushOptions(transport=transport, folder=folder)
    with Publisher(model, [replica], options) as publisher:
        return publisher.push(version, measure_memcpy=measure_memcpy)


def memcpy_seconds(tensors: Sequence[tuple[str, torch.Tensor]]) -> float:
    """Seconds to copy the same bytes into memory that is already mapped: the floor of a push."""
    copies = [torch.empty_like(tensor) for _, tensor in tensors]
    for copy, (_, tensor) in zip(copies, tensors, strict=True):
        copy.copy_(tensor)
    _synchronize(tensors)
    started = time.perf_counter()
    for copy, (_, tensor) in zip(copies, tensors, strict=True):
        copy.copy_(tensor)
    _synchronize(tensors)
    return time.perf_counter() - started


def _synchronize(tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    if tensors and tensors[0][1].is_cuda:
        torch.cuda.synchronize(tensors[0][1].device)
