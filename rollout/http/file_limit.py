"""Room for thousands of connections: each is a file, and the usual limit is 1,024."""

from __future__ import annotations

import contextlib
import resource

_MAX_FILES = 65536


def raise_file_limit() -> None:
    """Raise this process's limit of open files as far as the system lets it, to 65,536."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(_MAX_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            # A system may allow less than the limit it names.
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
