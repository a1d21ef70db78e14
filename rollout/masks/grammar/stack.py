"""Stacks of threads that compile grammars.

llguidance compiles by recursion, as deep as the rules of a grammar lead into each other, and a
stack that is too small ends the whole process. So a trial has less of it than the leader.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

TRIALS_STACK_BYTES = 8 << 20
LEADERS_STACK_BYTES = 32 << 20


@contextmanager
def stack_of(num_bytes: int) -> Iterator[None]:
    """Threads that are started within have a stack of so many bytes, whatever `ulimit -s` says."""
    before = threading.stack_size(num_bytes)
    try:
        yield
    finally:
        threading.stack_size(before)
