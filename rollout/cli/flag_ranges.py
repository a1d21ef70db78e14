"""What the values of a command line may be: one table of numbers for `serve` and `offline`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType

from engine.config import GIB, MAX_DRAFT_TOKENS, MIB, EngineConfig
from engine.errors import InvalidRequest
from engine.protocol.types import INT32_MAX, INT64_MAX, MAX_SECONDS, MAX_VERSION
from engine.protocol.urls import url_fault
from rollout.http.config import ServeConfig
from rollout.parsers.formats import select_format
from rollout.router.config import RouterConfig


@dataclass(frozen=True)
class Range:
    """The field at `path` of a configuration, counted in `unit`: from `least` to `most`, both
    included; above `least` if `open`. NaN is in no range; None is an option not given."""

    path: str
    least: float
    most: float
    open: bool = False
    unit: int = 1

    def check(self, config: EngineConfig | ServeConfig | RouterConfig, option: str) -> None:
        """Raise InvalidRequest, naming the option, for a number out of the range."""
        found = attrgetter(self.path)(config)
        if found is None:
            return
        value = found if self.unit == 1 else found / self.unit
        if not self.least <= value <= self.most or (self.open and value == self.least):
            above = "above" if self.open else "from"
            raise InvalidRequest(
                f"is {value}; give a number {above} {self.least} to {self.most}", field=option
            )


_TIB = 1 << 20
"""In MiB, and a PiB in GiB: more than any machine has."""

ENGINE_RANGES: Mapping[str, Range] = MappingProxyType(
    {
        "--tp": Range("parallel.tp_size", 1, 1024),
        "--dp": Range("parallel.dp_size", 1, 1024),
        "--context-length": Range("context_length", 1, INT32_MAX),
        "--max-running": Range("scheduler.max_running", 1, INT32_MAX),
        "--max-waiting": Range("scheduler.max_waiting", 1, INT32_MAX),
        "--max-samples": Range("scheduler.max_samples", 1, INT32_MAX),
        "--max-sessions": Range("sessions.max_sessions", 0, INT32_MAX),
        "--session-timeout-s": Range("sessions.session_timeout_s", 0, MAX_SECONDS, open=True),
        "--max-rollouts": Range("sessions.max_rollouts", 0, INT32_MAX),
        "--rollout-timeout-s": Range("sessions.rollout_timeout_s", 0, MAX_SECONDS, open=True),
        "--kv-memory": Range("cache.memory_bytes", 0, _TIB, open=True, unit=GIB),
        "--mem-fraction": Range("cache.memory_fraction", 0, 1, open=True),
        "--page-size": Range("cache.page_size", 1, INT32_MAX),
        "--trainer-memory": Range("memory.trainer_bytes", 0, _TIB, unit=GIB),
        "--trainer-training-memory": Range("memory.trainer_training_bytes", 0, _TIB, unit=GIB),
        "--draft-tokens": Range("speculative.draft_tokens", 1, MAX_DRAFT_TOKENS),
        "--base-gpu": Range("parallel.base_gpu", 0, 1023),
        "--weight-version": Range("weight_version", 0, MAX_VERSION),
        "--seed": Range("seed", -INT64_MAX - 1, INT64_MAX),
    }
)

SERVE_RANGES: Mapping[str, Range] = MappingProxyType(
    {
        "--port": Range("port", 0, 65535),
        "--max-body-mib": Range("max_body_bytes", 1, _TIB, unit=MIB),
        "--max-control-body-mib": Range("max_control_body_bytes", 1, _TIB, unit=MIB),
        "--max-held-body-mib": Range("max_held_body_bytes", 1, _TIB, unit=MIB),
        "--receive-timeout-s": Range("receive_timeout_s", 0, 86400, open=True),
        "--send-timeout-s": Range("send_timeout_s", 0, 86400, open=True),
        "--request-timeout-s": Range("request_timeout_s", 0, MAX_SECONDS),
        "--max-request-timeout-s": Range("max_request_timeout_s", 0, MAX_SECONDS),
        "--drain-timeout-s": Range("drain_timeout_s", 0, 86400),
        "--stuck-step-s": Range("stuck_step_s", 0, 86400),
        "--http-processes": Range("http_processes", 1, 256),
    }
)


ROUTER_RANGES: Mapping[str, Range] = MappingProxyType(
    {
        "--port": Range("port", 0, 65535),
        "--max-body-mib": Range("max_body_bytes", 1, _TIB, unit=MIB),
        "--max-control-body-mib": Range("max_control_body_bytes", 1, _TIB, unit=MIB),
        "--max-held-body-mib": Range("max_held_body_bytes", 1, _TIB, unit=MIB),
        "--receive-timeout-s": Range("receive_timeout_s", 0, 86400, open=True),
        "--send-timeout-s": Range("send_timeout_s", 0, 86400, open=True),
        "--silence-s": Range("silence_s", 0, 86400, open=True),
        "--patience-s": Range("patience_s", 0, 86400),
    }
)


def check_router(config: RouterConfig) -> None:
    """Look at every number of a router's options. Raises InvalidRequest naming the option."""
    for option, span in ROUTER_RANGES.items():
        span.check(config, option)


def check_engine(config: EngineConfig) -> None:
    """Look at every number that the options of an engine give. Raises InvalidRequest naming the
    option."""
    for option, span in ENGINE_RANGES.items():
        span.check(config, option)


def check_serve(config: ServeConfig) -> None:
    """`check_engine`, and the numbers and names of the server itself."""
    check_engine(config.engine)
    if config.router and (fault := url_fault(config.router)):
        raise InvalidRequest(fault, field="--router")
    select_format(None, config.tool_parser, config.reasoning_parser)
    for option, span in SERVE_RANGES.items():
        span.check(config, option)
