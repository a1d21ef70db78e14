"""Run programs: one, or as many as there are arguments, on one backend."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from rollout.programs.backends.base import Backend, Session
from rollout.programs.backends.replica_backend import ReplicaBackend
from rollout.programs.backends.server_backend import ServerBackend
from rollout.programs.concurrently import awaited, together
from rollout.programs.context import Context
from rollout.programs.state import State
from rollout.replica.base import Replica
from rollout.requests.seeds import derive_seed
from rollout.text.chat_template import check_variables
from rollout.text.tokenizer import Tokenizer

T = TypeVar("T")
Program = Callable[..., Awaitable[T]]
"""An async function of a State and its own arguments."""


class Runner:
    """Runs programs on a backend. A program of the same arguments and seed draws the same tokens on
    every backend of the same weights, alone or in a batch.

    seed: what seeds of programs are derived from, by their places in a batch.
    chat_template_kwargs: variables of the chat template, such as `enable_thinking`.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        seed: int = 0,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._backend = backend
        self._seed = seed
        self._variables = dict(chat_template_kwargs or {})
        check_variables(self._variables)

    @classmethod
    def of_replica(
        cls, replica: Replica, tokenizer: Tokenizer | None = None, **options: Any
    ) -> Runner:
        """On a replica that nobody else steps meanwhile, such as one of `rollout.launch`."""
        return cls(ReplicaBackend(replica, tokenizer), **options)

    @classmethod
    def of_server(
        cls, url: str, *, api_key: str = "", tokenizer: Tokenizer | None = None, **options: Any
    ) -> Runner:
        """On a server or router; see `ServerBackend`."""
        return cls(ServerBackend(url, api_key=api_key, tokenizer=tokenizer), **options)

    def run(self, program: Program[T], *args: Any, seed: int | None = None, **named: Any) -> T:
        """What `program(state, *args, **named)` returns. Raises what it raises. For callers
        without an event loop; others await `run_async`."""
        return asyncio.run(self.run_async(program, *args, seed=seed, **named))

    async def run_async(
        self, program: Program[T], *args: Any, seed: int | None = None, **named: Any
    ) -> T:
        """As `run`. Cancelling it aborts the program's requests."""
        async with self._backend.open() as session:
            return await awaited(
                program, self._state(session, seed, 0, "the program"), *args, **named
            )

    def run_batch(
        self,
        program: Program[T],
        arguments: Sequence[Mapping[str, Any]],
        *,
        seed: int | None = None,
        return_exceptions: bool = False,
    ) -> list[T]:
        """What `program(state, **arguments[i])` returns, for every i in order; all run at once.

        return_exceptions: errors stand in the place of results. Else the first is raised, with a
        note of its place, once the other programs were ended and their requests aborted.
        """
        return asyncio.run(
            self.run_batch_async(program, arguments, seed=seed, return_exceptions=return_exceptions)
        )

    async def run_batch_async(
        self,
        program: Program[T],
        arguments: Sequence[Mapping[str, Any]],
        *,
        seed: int | None = None,
        return_exceptions: bool = False,
    ) -> list[T]:
        """As `run_batch`."""
        async with self._backend.open() as session:
            states = [
                self._state(session, seed, place, f"program {place}")
                for place in range(len(arguments))
            ]
            running = [
                _call(program, state, named, return_exceptions)
                for state, named in zip(states, arguments, strict=True)
            ]
            return await together(running, _in_program)

    def _state(self, session: Session, seed: int | None, place: int, where: str) -> State:
        base = self._seed if seed is None else seed
        tokenizer = self._backend.tokenizer
        context = Context(tokenizer, self._variables)
        return State(session, tokenizer, context, derive_seed(base, "program", place), where)


async def _call(
    program: Program[Any], state: State, named: Mapping[str, Any], return_exceptions: bool
) -> Any:
    if not return_exceptions:
        return await awaited(program, state, **named)
    # In a task of its own: whether it cancelled itself, or the batch was, is then told apart.
    running = asyncio.ensure_future(_call(program, state, named, return_exceptions=False))
    try:
        await asyncio.wait([running])
    except asyncio.CancelledError:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        raise
    if running.cancelled():
        return asyncio.CancelledError("it cancelled itself")
    error = running.exception()
    return error if isinstance(error, Exception) else running.result()


def _in_program(place: int, error: BaseException) -> BaseException:
    error.add_note(f"in program {place} of the batch")
    return error
