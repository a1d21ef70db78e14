"""How a process of this project logs, from its options."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

from rollout.logs.request_id import REQUEST_ID

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

ACCESS_LOGGER = "rollout.access"
"""Of a line for each request, which `--access-log` asks for."""

_QUIET = ("httpx", "httpcore", "opentelemetry")
"""Libraries that write a line for each of their own calls."""


class TextFormatter(logging.Formatter):
    """The message, for people, with the name of a process and the id of a request where there are
    any."""

    def __init__(self, process: str) -> None:
        super().__init__(f"{process}: %(message)s" if process else "%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """One record; a traceback follows it."""
        text, name = super().format(record), REQUEST_ID.get()
        first, mark, rest = text.partition("\n")
        return f"{first} [{name}]{mark}{rest}" if name else text


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
        return json.dumps(found, ensure_ascii=False, default=str)


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
