"""The rollouts that are open: their calls, their limits, and the commands about them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec.structs import replace

from engine.config import SessionConfig
from engine.errors import InvalidRequest, StoreFull, UnknownRollout
from engine.protocol import (
    BeginCall,
    CallRecord,
    CloseRollout,
    EndCall,
    GetRollout,
    OpenRollout,
    Reply,
    RewardRollout,
    RolloutCommand,
    RolloutState,
)
from engine.protocol.rollouts import History
from rollout.sessions.call_tree import NODE_BYTES, CallTree
from rollout.sessions.farewells import Farewells
from rollout.sessions.names import check_name


@dataclass(eq=False, kw_only=True)
class _Rollout:
    id: str
    timeout_s: float
    history: History
    used_at: float
    routes: bool = False
    tree: CallTree = field(default_factory=CallTree)
    calls: list[CallRecord] = field(default_factory=list)
    reward: float | None = None

    @property
    def num_bytes(self) -> int:
        return self.tree.num_bytes + NODE_BYTES * (1 + len(self.calls))

    @property
    def complete(self) -> bool:
        return not any(call.open or (call.failed and not call.refused) for call in self.calls)


class OpenRollouts:
    """By id. Those that nobody used for too long are forgotten whenever another call looks.

    clock: seconds that only grow.
    """

    def __init__(self, config: SessionConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._open: dict[str, _Rollout] = {}
        self._gone = Farewells()

    def __len__(self) -> int:
        return len(self._open)

    def handle(self, command: RolloutCommand) -> Reply:
        """Run a command. Raises its typed error."""
        self.expire()
        if isinstance(command, OpenRollout):
            return self._told(self._new(command))
        found = self._get(command.rollout)
        found.used_at = self._clock()
        match command:
            case BeginCall():
                return self._begin(found, command)
            case EndCall():
                self._end(found, command)
            case RewardRollout():
                _reward(found, command)
            case GetRollout():
                return self._told(found, whole=True)
            case CloseRollout():
                del self._open[found.id]
                self._gone.note(found.id, "was deleted")
        return self._told(found)

    def expire(self) -> None:
        """Forget the rollouts that nobody used for too long."""
        now = self._clock()
        for found in [r for r in self._open.values() if now - r.used_at > r.timeout_s]:
            del self._open[found.id]
            self._gone.note(found.id, f"was forgotten after {found.timeout_s:g} s without a call")

    def _new(self, command: OpenRollout) -> _Rollout:
        name, longest = command.rollout or uuid.uuid4().hex, self._config.rollout_timeout_s
        check_name(name, "rollout")
        if name in self._open:
            raise InvalidRequest(f"rollout {name} is open already", field="rollout")
        if command.timeout_s is not None and command.timeout_s > longest:
            raise InvalidRequest(
                f"timeout_s is {command.timeout_s:g}; this engine keeps rollouts without a call "
                f"for at most {longest:g} s (--rollout-timeout-s)",
                field="timeout_s",
            )
        if len(self._open) >= self._config.max_rollouts:
            raise StoreFull(
                f"{len(self._open)} rollouts are open, the most (--max-rollouts); delete some",
                field="rollout",
            )
        self._gone.forget(name)
        timeout_s = longest if command.timeout_s is None else command.timeout_s
        found = _Rollout(
            id=name,
            timeout_s=timeout_s,
            history=command.history,
            routes=command.return_routed_experts,
            used_at=self._clock(),
        )
        self._open[name] = found
        return found

    def _get(self, name: str) -> _Rollout:
        found = self._open.get(name)
        if found is None:
            why = self._gone.why(name) or (
                "never was open here, or went when the engine was started again"
            )
            raise UnknownRollout(f"rollout {name[:128]!r} {why}; open another", field="rollout")
        return found

    def _begin(self, found: _Rollout, command: BeginCall) -> Reply:
        self._check_room(NODE_BYTES)
        found.calls.append(CallRecord(open=True))
        kept = found.history == "kept"
        queries = command.prompts if kept else [replace(q, keys=[]) for q in command.prompts]
        prefixes = [found.tree.prefix(query) for query in queries]
        reply = self._state(found)
        return Reply(rollout=replace(reply, call=len(found.calls) - 1, prefixes=prefixes))

    def _end(self, found: _Rollout, command: EndCall) -> None:
        if command.call >= len(found.calls) or not found.calls[command.call].open:
            raise InvalidRequest(f"call {command.call} is not in progress", field="call")
        size = sum(NODE_BYTES + sample.num_bytes for sample in command.samples)
        try:
            self._check_room(size)
        except StoreFull as error:
            found.calls[command.call] = CallRecord(id=command.id, failed=error.message)
            raise
        for sample in command.samples:
            found.tree.add(sample, command.call)
        found.calls[command.call] = CallRecord(
            id=command.id, failed=command.failed, refused=command.refused
        )

    def _check_room(self, num_bytes: int) -> None:
        held = sum(rollout.num_bytes for rollout in self._open.values())
        most = self._config.rollout_bytes
        if held + num_bytes > most:
            raise StoreFull(
                f"the open rollouts take {held} bytes, of {most} at most, and {num_bytes} more do "
                "not fit; read and delete those that are over",
                field="rollout",
            )

    def _told(self, found: _Rollout, *, whole: bool = False) -> Reply:
        state = self._state(found)
        if whole:
            state = replace(state, nodes=found.tree.nodes, calls=found.calls)
        return Reply(rollout=state)

    def _state(self, found: _Rollout) -> RolloutState:
        return RolloutState(
            rollout=found.id,
            timeout_s=found.timeout_s,
            history=found.history,
            return_routed_experts=found.routes,
            complete=found.complete,
            num_calls=len(found.calls),
            reward=found.reward,
        )


def _reward(found: _Rollout, command: RewardRollout) -> None:
    if command.call is None:
        found.reward = command.reward
        return
    if command.call >= len(found.calls):
        raise InvalidRequest(
            f"call is {command.call}; rollout {found.id} has {len(found.calls)} calls, from 0",
            field="call",
        )
    call = found.calls[command.call]
    found.calls[command.call] = replace(call, reward=command.reward)
