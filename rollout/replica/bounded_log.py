"""The log of a spawned process of the engine: its stderr, kept below a size."""

from __future__ import annotations

import logging
import os
import stat
import sys

_MAX_BYTES = 16 << 20
_KEPT_BYTES = 1 << 20


class BoundedStderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes records to stderr and cuts the file behind it to its end, `kept_bytes`, whenever
    it has grown past `max_bytes`.

    The file must be open for reading and appending, as whoever spawns the process opens it;
    anything else than a file is left alone. What others write to stderr is kept, and cut, alike.
    """

    def __init__(self, *, max_bytes: int = _MAX_BYTES, kept_bytes: int = _KEPT_BYTES) -> None:
        super().__init__(sys.stderr)
        self._max_bytes = max_bytes
        self._kept_bytes = kept_bytes

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        super().emit(record)
        self.flush()
        try:
            self._cut(sys.stderr.fileno())
        except (OSError, ValueError):
            # A stream without a descriptor, or one that cannot be read again.
            return

    def _cut(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size <= self._max_bytes:
            return
        kept = os.pread(descriptor, self._kept_bytes, status.st_size - self._kept_bytes)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, b"(what came before was cut)\n" + kept)


def log_to_stderr(name: str) -> None:
    """Log what matters of this process to its stderr; `name` stands in every line."""
    handler = BoundedStderr()
    handler.setFormatter(logging.Formatter(f"%(asctime)s {name} %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
