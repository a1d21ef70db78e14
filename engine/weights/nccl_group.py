"""A group on GPU memory: one NCCL communicator with a stream of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.comm.nccl import Communicator, NcclError
from engine.comm.rendezvous import NCCL_ID_KEY, backend_prefix
from engine.errors import GroupError, WeightUpdateError
from engine.protocol import JoinGroup
from engine.weights import trainer_store
from engine.weights.group import broken
from engine.weights.helpers import Helpers, nothing
from engine.weights.lane import Look
from kernels.torch_compat import PrefixStore, Store

_POLL_S = 0.00005
_LIVENESS_S = 2.0


@dataclass(frozen=True)
class _Ticket:
    done: torch.cuda.Event
    source: int
    tensor: str


class NcclGroup:
    """This rank's end of a communicator with a trainer.

    unique_id: returns the 128 bytes that rank 0 made, by the deadline given. It is asked for
    at the first broadcast, since torch's process group makes them then.
    """

    lands = True

    def __init__(
        self,
        command: JoinGroup,
        rank: int,
        device: torch.device,
        unique_id: Callable[[float], bytes],
        store: Store | None = None,
        look: Look = nothing,
        helpers: Helpers | None = None,
    ) -> None:
        self.name = command.name
        self.look = look
        self._helpers = helpers or Helpers()
        self._dropped: list[Communicator] = []
        self._zero: torch.Tensor | None = None
        self._command = command
        self._rank = rank
        self._device = device
        self._unique_id = unique_id
        self._store = store
        self._comm: Communicator | None = None
        # Before copies out of the buffers, which would take every processor first.
        self._stream = torch.cuda.Stream(device, priority=-1)

    @classmethod
    def behind_store(
        cls,
        store: Store,
        command: JoinGroup,
        rank: int,
        device: torch.device,
        deadline: float,
        look: Look = nothing,
        helpers: Helpers | None = None,
    ) -> NcclGroup:
        """A group whose rank 0 is a `torch.distributed` NCCL process group, which publishes the
        unique id of its first communicator under the key "0" of its device."""
        keys = PrefixStore(command.name, store)
        trainer_store.announce_and_await(keys, command, rank, deadline, look)
        backend_keys = PrefixStore(backend_prefix(command.name, "cuda"), keys)

        def unique_id(deadline: float) -> bytes:
            return trainer_store.await_key(backend_keys, NCCL_ID_KEY, command, deadline)

        return cls(command, rank, device, unique_id, store, look, helpers)

    def connect(self, deadline: float) -> Communicator:
        """The communicator; built by all ranks at once, here if it was not yet."""
        if self._comm is None:
            unique_id = self._helpers.call(lambda: self._unique_id(deadline), deadline, self.look)
            with torch.cuda.device(self._device):
                self._comm = Communicator(
                    unique_id,
                    rank=self._rank,
                    world_size=self._command.world_size,
                    deadline=deadline,
                    look=lambda: self.look(),
                )
        return self._comm

    def warm_up(self, deadline: float) -> None:
        """The all-reduce of one zero that vLLM's trainers expect of every rank that joined.

        Raises GroupError, and drops the group, if it has not ended by `deadline`.
        """
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                # Kept as long as the group: its abort may leave it to be written.
                self._zero = torch.zeros(1, dtype=torch.float32, device=self._device)
                comm = self.connect(deadline)
                comm.sum_one(
                    self._zero.data_ptr(), stream=self._stream.cuda_stream, deadline=deadline
                )
            self.wait(_Ticket(self._stream.record_event(), 0, "the warm-up all-reduce"), deadline)
        except (NcclError, TimeoutError) as error:
            self.abort()
            raise GroupError(
                f"group {self.name!r} of {self._command.world_size} ranks could not be formed: "
                f"{error or 'a rank did not come in time'}",
                field="world_size",
            ) from error

    def empty(self, num_bytes: int) -> torch.Tensor:
        """See `Group`."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def broadcast(self, buffer: torch.Tensor, source: int, deadline: float, tensor: str) -> _Ticket:
        """See `Group`."""
        try:
            comm = self.connect(deadline)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.device(self._device):
                comm.broadcast(
                    buffer.data_ptr(),
                    buffer.numel(),
                    root=source,
                    stream=self._stream.cuda_stream,
                    deadline=deadline,
                )
        except (NcclError, TimeoutError) as error:
            raise self._broken(source, tensor, error) from error
        return _Ticket(self._stream.record_event(), source, tensor)

    def receive(
        self, messages: Sequence[tuple[torch.Tensor, int]], deadline: float, tensor: str
    ) -> _Ticket:
        """See `Group`."""
        sources = [source for _, source in messages]
        try:
            comm = self.connect(deadline)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.device(self._device):
                comm.exchange(
                    receives=[(b.data_ptr(), b.nbytes, source) for b, source in messages],
                    stream=self._stream.cuda_stream,
                    deadline=deadline,
                )
        except (NcclError, TimeoutError) as error:
            raise self._broken(sources[0] if sources else 0, tensor, error) from error
        return _Ticket(self._stream.record_event(), sources[0] if sources else 0, tensor)

    def wait(self, ticket: _Ticket, deadline: float) -> None:
        """See `Group`."""
        next_look = time.monotonic() + _LIVENESS_S
        while not ticket.done.query():
            self.look()
            now = time.monotonic()
            try:
                if now > deadline:
                    raise TimeoutError
                if now > next_look:
                    self._look_for_peers()
                    next_look = time.monotonic() + _LIVENESS_S
            except (NcclError, TimeoutError) as error:
                raise self._broken(ticket.source, ticket.tensor, error) from error
            time.sleep(_POLL_S)

    def is_alive(self) -> bool:
        """See `Group`."""
        return self._store is None or trainer_store.answers(self._store, self._helpers)

    def abort(self) -> bool:
        """See `Group`."""
        comm, self._comm = self._comm, None
        if comm is not None:
            comm.abort()
            self._dropped.append(comm)
        self._dropped = [other for other in self._dropped if not other.is_freed]
        return not self._dropped

    def _look_for_peers(self) -> None:
        """A kernel that waits for a dead process over NVLink waits for ever: ask elsewhere."""
        if self._comm is not None:
            self._comm.poll()
        if self._store is not None and not trainer_store.is_listening(self._command):
            raise NcclError("its store no longer answers")

    def _broken(self, source: int, tensor: str, error: Exception) -> WeightUpdateError:
        late = isinstance(error, TimeoutError)
        return broken(self.name, source, tensor, error, late=late)
