"""What may watch the calls of a generator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from engine.errors import EngineDead
from engine.protocol import Request, RequestOutput
from rollout.http.native.generate_call import GenerateCall
from rollout.http.native.sample import Sample


class Recorder(Protocol):
    """Sees the calls of a `Generator`."""

    async def began(self, call: GenerateCall) -> GenerateCall:
        """The call, with the prompts that are to be sampled from."""
        ...

    def sampling(self, samples: Sequence[Sample]) -> None:
        """These sequences are about to be sampled; each has its output once it has finished."""
        ...


class Journal(Protocol):
    """What the sequences of a call got elsewhere, and a note of what they get here.

    lost: set when the engine is gone under the call.
    """

    lost: EngineDead | None

    def sampling(self, samples: Sequence[Sample]) -> None:
        """These sequences are about to be sampled."""
        ...

    def replayed(self) -> Iterable[list[RequestOutput]]:
        """Outputs that they got, those that came together at once."""
        ...

    def to_send(self, sample: Sample) -> Request:
        """What the engine is to get of a sequence that took those."""
        ...

    async def record(self, outputs: Sequence[RequestOutput]) -> None:
        """Note what came."""
        ...
