"""Talk to a model that is loaded in a process of its own, which ends with this one."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Sequence

from engine.errors import EngineDead, by_name
from engine.protocol import Abort, GenerateRequest, Request, RequestOutput, SamplingParams
from rollout.replica.base import Replica
from rollout.requests.expand import expand
from rollout.terminal_chat.chat_config import Settings
from rollout.terminal_chat.talk import Piece, Turn
from rollout.text.detokenizer import Detokenizer, trim_stop_token
from rollout.text.tokenizer import Tokenizer


class ReplicaTalk:
    """A replica that `launch` makes, at once, and again after it died."""

    def __init__(self, model: str, tokenizer: Tokenizer, launch: Callable[[], Replica]) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._launch = launch
        self._replica: Replica | None = launch()

    @property
    def name(self) -> str:
        """See `Talk`."""
        return self._model

    def reply(self, turns: Sequence[Turn], settings: Settings) -> Generator[Piece, None, None]:
        """See `Talk`."""
        try:
            if self._replica is None:
                self._replica = self._launch()
            yield from self._reply(self._replica, turns, settings)
        except EngineDead:
            self.close()
            raise

    def close(self) -> None:
        """See `Talk`."""
        replica, self._replica = self._replica, None
        if replica is not None:
            replica.close()

    def _reply(
        self, replica: Replica, turns: Sequence[Turn], settings: Settings
    ) -> Generator[Piece, None, None]:
        seed = secrets.randbits(63) if settings.seed is None else settings.seed
        wire = GenerateRequest(
            input_ids=self._tokenizer.apply_chat_template(turns),
            sampling_params=SamplingParams(
                max_new_tokens=settings.max_tokens,
                temperature=1.0 if settings.temperature is None else settings.temperature,
                sampling_seed=seed,
            ),
            stream=True,
        )
        [request] = expand(wire, self._tokenizer, replica.state(), seed)
        replica.submit([request])
        ended = False
        try:
            reader = _Reader(self._tokenizer, request, settings.logprobs)
            while not ended:
                for output in replica.step():
                    if output.rid == request.rid:
                        ended = output.finish is not None
                        yield reader.read(output)
        except EngineDead:
            ended = True
            raise
        finally:
            if not ended:
                replica.send(Abort(rids=[request.rid], message="the chat stopped it"))


class _Reader:
    """The text of one reply as it comes."""

    def __init__(self, tokenizer: Tokenizer, request: Request, logprobs: bool) -> None:
        self._detokenizer = Detokenizer(tokenizer, request.sampling, request.prompt_ids)
        self._request = request
        self._logprobs = logprobs
        self._num_tokens = 0

    def read(self, output: RequestOutput) -> Piece:
        """What one output adds. Raises the error that ended the reply."""
        finish = output.finish
        if finish is not None and finish.error is not None:
            raise by_name(finish.error, finish.message or "", finish.field or "")
        ids = trim_stop_token(output.token_ids.tolist(), finish, self._request.sampling)
        self._num_tokens += len(output.token_ids)
        texts = [self._detokenizer.feed([token_id]).text for token_id in ids]
        if finish is not None:
            texts.append(self._detokenizer.finish().text)
        pairs = zip(texts, output.logprobs.tolist(), strict=False)
        return Piece(
            text="".join(texts),
            tokens=tuple(pairs) if self._logprobs else (),
            num_tokens=self._num_tokens,
        )
