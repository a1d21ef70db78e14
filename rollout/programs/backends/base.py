"""What runs the requests of programs: a replica of this process, or a server."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from engine.protocol import GenerateRequest, GenerateResponse
from rollout.text.tokenizer import Tokenizer


class Session(Protocol):
    """A backend while programs run on it, in one event loop."""

    async def generate(self, wire: GenerateRequest) -> GenerateResponse:
        """The reply to one request of ids, of one sample, which states its seed. Cancelling the
        call aborts the request. Raises the typed error of one that was refused."""
        ...


class Backend(Protocol):
    """Where programs run. Two backends with the same model and weights draw the same tokens."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        ...

    def open(self) -> AbstractAsyncContextManager[Session]:
        """Until it is left: then nothing of its requests is running any more."""
        ...
