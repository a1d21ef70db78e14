"""Which request a line of the log is about.

A line may be written deep below the request, by this project's code or a library's, so the id is
in the context of the task that handles it (`contextvars`), where a formatter finds it.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from random import getrandbits

HEADER = b"x-request-id"
"""Of requests and replies, in lower case."""

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the request that is being handled; "" outside of any."""

_GOOD = re.compile(rb"[\x21-\x7e]{1,128}")


def request_id_of(given: bytes) -> str:
    """The id that a client gave, if it may stand in a header and in a log, else a new one."""
    if _GOOD.fullmatch(given):
        return given.decode("ascii")
    return f"{getrandbits(128):032x}"
