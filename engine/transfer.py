"""Arrays between host and GPU without making either wait for the other.

A copy from or to ordinary memory stalls the host until the GPU has caught up; one from or to
pinned memory is queued like a kernel. torch keeps a pinned block from reuse until the copies
that touch it are done.
"""

from __future__ import annotations

import numpy as np
import torch


def wait_for(device: torch.device) -> None:
    """Wait for what is queued on the current stream of `device`, so that another thread, stream
    or process may go on from here."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor on `device`; on a CPU it shares the array's memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class Fetch:
    """A tensor on its way to the host, copied in stream order after what is queued now."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def numpy(self) -> np.ndarray:
        """The values; waits for this copy and for nothing queued after it."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()
