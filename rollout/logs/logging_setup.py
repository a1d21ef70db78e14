"""How a process of this project logs, from its options."""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any, Literal

from rollout.logs.request_id import REQUEST_ID

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

ACCESS_LOGGER = "rollout.access"
"""Of a line for each request, which `--access-log` asks for."""

_QUIET = ("httpx", "httpcore", "urllib3", "opentelemetry")
"""Libraries that write a line for each of their own calls."""


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""What moves a terminal's cursor, ends a line in another way than newline, or cannot be encoded."""


class TextFormatter(logging.Formatter):
    """The message, for people, with the name of a process and the id of a request where there are
    any.

    What clients sent may be in it: what would steer a terminal is escaped, and further lines are
    indented, so that none passes for a line of the log.
    """

    def __init__(self, process: str) -> None:
        super().__init__(f"{process}: %(message)s" if process else "%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """One record; a traceback follows it."""
        text, name = super().format(record), REQUEST_ID.get()
        text = _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
        first, *more = text.split("\n")
        first = f"{first} [{name}]" if name else first
        return "\n  ".join([first, *more])


class JsonFormatter(logging.Formatter):
    """An object a line: time (UTC, ISO 8601), level, logger and message; process, request_id and
    exception where there are any; and what the record was given as `extra={"fields": {...}}`."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        found: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        more = {"process": self._process, "request_id": REQUEST_ID.get()}
        found |= {name: value for name, value in more.items() if value}
        found |= getattr(record, "fields", {})
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        # In ASCII any stream takes it, half a surrogate pair too.
        return json.dumps(found, default=str)


def set_up_logging(
    form: LogFormat = "text", level: LogLevel = "info", *, process: str = "", access: bool = False
) -> None:
    """Log to stderr from now on, unless logging was set up before. process: stands in every line.
    access: of each request too, whatever the level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process) if form == "json" else TextFormatter(process))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
    logging.getLogger(ACCESS_LOGGER).setLevel(logging.INFO if access else logging.CRITICAL)
