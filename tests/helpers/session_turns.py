"""A scheduler with sessions on a mock executor, which checks what every turn reads."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from msgspec.structs import replace

from engine.config import SessionConfig
from engine.protocol import OpenSession, Request, RequestOutput
from rollout.sessions.turns_in_progress import SessionTurns
from tests.helpers.scheduling import Bench, check_output, joined, make_request


class Clock:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class SessionBench(Bench):
    """`clock` moves by hand."""

    def __init__(self, *, sessions: SessionConfig | None = None, **options: object) -> None:
        super().__init__(**options)
        self.clock = Clock()
        self.turns = SessionTurns(
            self.scheduler,
            sessions or SessionConfig(),
            int(options.get("context_length", 128)),
            emit=self.keep,
            clock=self.clock,
        )

    def open(self, name: str = "s", **fields: object) -> str:
        """Open a session."""
        reply = self.turns.handle(OpenSession(session=name, **fields))
        assert reply.session is not None
        return reply.session.session

    def add(self, *requests: Request) -> None:
        """Queue requests, turns among them."""
        for request in requests:
            if request.session and request.kv_policy == "keep":
                self.executor.kept_seeds.add(request.seed)
            answer = self.turns.admit(request, self.scheduler.add)
            self.keep([] if answer is None else [answer])

    def keep(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        """File outputs, and end the turns that they end."""
        self.turns.take(outputs)
        return super().keep(outputs)

    def tokens(self, name: str = "s") -> list[int]:
        """What a session has."""
        found: list[int] = self.turns.sessions.get(name).tokens.tolist()
        return found

    def held(self, name: str = "s") -> int:
        """Tokens whose KV a session holds."""
        return self.cache.idle.num_tokens(name)

    def finish(self) -> None:
        """Step until nothing is left; sessions hold what they hold."""
        while self.scheduler.has_work() or self._results or self._waits is not None:
            self.step()
        self.scheduler.check_integrity()

    def whole(self, request: Request) -> Request:
        """A turn as the one request that it is."""
        if not request.session:
            return request
        before = self.tokens(request.session)
        before = before if request.session_at < 0 else before[: request.session_at]
        prompt = np.array([*before, *request.prompt_ids.tolist()], np.int32)
        return replace(request, prompt_ids=prompt)

    def turn(
        self, rid: str, prompt: Iterable[int], *, session: str = "s", **fields: object
    ) -> RequestOutput:
        """Run one turn to its end; checks that it came out as that one request would."""
        request = make_request(rid, prompt, session=session, **fields)
        whole = self.whole(request)
        self.add(request)
        self.finish()
        output = joined(self.outputs[rid])
        check_output(whole, output)
        self.check_kv_spans(whole, output)
        assert output.prompt_tokens == len(whole.prompt_ids)
        assert self.tokens(session) == whole.prompt_ids.tolist() + output.token_ids.tolist()
        return output
