"""Which errors of torch leave no device to go on with."""

from __future__ import annotations

_DEVICE_SIGNS = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "NCCL")


def breaks_device(error: Exception) -> bool:
    """Whether an error of torch says that the accelerator, not one step, is broken."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if "OutOfMemoryError" in names:
        return False
    return "AcceleratorError" in names or any(sign in str(error) for sign in _DEVICE_SIGNS)
