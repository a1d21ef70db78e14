"""What the numbers of a command line may be: one table for `serve` and `offline`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from engine.errors import InvalidRequest
from engine.protocol.types import INT32_MAX, INT64_MAX, MAX_VERSION


@dataclasses.dataclass(frozen=True)
class Range:
    """From `least` to `most`, both included; above `least` if `open`. NaN is in no range."""

    least: float
    most: float
    open: bool = False

    def holds(self, value: float) -> bool:
        """Whether the value lies in it."""
        return self.least <= value <= self.most and not (self.open and value == self.least)

    def __str__(self) -> str:
        return f"{'above' if self.open else 'from'} {self.least} to {self.most}"


_COUNT = Range(1, INT32_MAX)
_GIB_OF_MEMORY = 1 << 20
_MIB_OF_BODY = Range(1, 1 << 20)

RANGES: Mapping[str, Range] = MappingProxyType(
    {
        "tp": Range(1, 1024),
        "port": Range(0, 65535),
        "context_length": _COUNT,
        "max_running": _COUNT,
        "max_waiting": _COUNT,
        "max_samples": _COUNT,
        "kv_memory": Range(0, _GIB_OF_MEMORY, open=True),
        "mem_fraction": Range(0, 1, open=True),
        "page_size": _COUNT,
        "trainer_memory": Range(0, _GIB_OF_MEMORY),
        "trainer_training_memory": Range(0, _GIB_OF_MEMORY),
        "base_gpu": Range(0, 1023),
        "weight_version": Range(0, MAX_VERSION),
        "seed": Range(-INT64_MAX - 1, INT64_MAX),
        "max_body_mib": _MIB_OF_BODY,
        "max_control_body_mib": _MIB_OF_BODY,
        "max_held_body_mib": _MIB_OF_BODY,
        "receive_timeout_s": Range(0, 86400, open=True),
    }
)


def check_numbers(args: Any) -> None:
    """Look at every number of a command's options, a dataclass; None is an option not given.

    Raises InvalidRequest naming the option.
    """
    for name in (field.name for field in dataclasses.fields(args)):
        value = getattr(args, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not RANGES[name].holds(value):
            option = f"--{name.replace('_', '-')}"
            raise InvalidRequest(f"is {value}; give a number {RANGES[name]}", field=option)
