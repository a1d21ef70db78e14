"""A sender in a process of its own, on the first GPU, for tests whose engine has the second.

    python -m tests.helpers.nccl_sender ours|torch FOLDER THEN

Prints its port, forms a group of two, and broadcasts the uint8 tensors that FOLDER holds, file by
file. THEN says how it ends: "close", "stall" until it is killed, "die" by a signal, or "late",
which waits for a receiver that takes no more and must end with an error.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.errors import WeightUpdateError
from kernels.torch_compat import PrefixStore, TCPStore
from trainer_bridge.process_group import SenderGroup

NAME = "g"
LATE_S = 3.0


class TorchSender:
    """Rank 0 as torch's own helper builds it for a named group."""

    def __init__(self) -> None:
        self._store = TCPStore(
            "127.0.0.1", 0, 2, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        self.port = self._store.port
        self._group: Any = None

    def connect(self) -> None:
        keys = PrefixStore("cuda/", PrefixStore(f"{NAME}/", PrefixStore(NAME, self._store)))
        self._group = dist.ProcessGroupNCCL(keys, 0, 2, dist.ProcessGroupNCCL.Options())

    def broadcast(self, tensor: torch.Tensor) -> Any:
        return self._group.broadcast([tensor], dist.BroadcastOptions())

    def wait(self, work: Any, deadline: float) -> None:
        work.wait()
        torch.cuda.synchronize()

    def close(self) -> None:
        self._group.abort()


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(kind: str, folder: str, then: str) -> None:
    torch.cuda.set_device(0)
    sender: Any = TorchSender()
    if kind == "ours":
        sender = SenderGroup(NAME, world_size=2, backend="nccl", timeout_s=60.0)
    say(str(sender.port))
    sender.connect()
    for path in sorted(Path(folder).iterdir()):
        for buffer in torch.load(path):
            sender.wait(sender.broadcast(buffer.cuda()), time.monotonic() + 60.0)
    say("sent")
    match then:
        case "stall":
            time.sleep(120.0)
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "late":
            # More than NCCL would take in without a receiver.
            extra = torch.ones(1 << 28, dtype=torch.uint8, device="cuda")
            try:
                sender.wait(sender.broadcast(extra), time.monotonic() + LATE_S)
            except WeightUpdateError as error:
                say(f"{type(error).__name__}: {error}")
            # Past the point where a watchdog would have ended the process.
            time.sleep(2.0)
            assert float(torch.ones(4, device="cuda").sum()) == 4.0
    sender.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
