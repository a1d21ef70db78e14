"""What a choice knows of a request and of a worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Candidate(Protocol):
    """A worker that may be asked. num_open: sequences on it; num_bytes: of their prompts. epoch:
    moves whenever what it had cached is gone."""

    url: str
    num_open: int
    num_bytes: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request says that a choice may depend on.

    prompt: the JSON of its prompt, as it came; b"" where it has none. key: of a session that is to
    stay where it is; b"" for none. num_samples: sequences that share the prompt.
    """

    prompt: bytes = b""
    key: bytes = b""
    num_samples: int = 1


NOTHING = Ask()


class Choice(NamedTuple):
    """place: of the worker among the candidates. reason: in a word, for the metrics. num_hit: bytes
    of the prompt that it should have cached."""

    place: int
    reason: str
    num_hit: int = 0


class Policy(Protocol):
    """A way to choose."""

    def choose(self, ask: Ask, candidates: Sequence[Candidate]) -> Choice:
        """One of the candidates, of which there is at least one."""
        ...
