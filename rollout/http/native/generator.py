"""Run the sequences of one HTTP call on the engine."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import count
from typing import Concatenate, ParamSpec, TypeVar

import msgspec

from engine.errors import EngineDead, InvalidRequest, SlipstreamError
from engine.protocol import Request, RequestOutput
from rollout.http.engine.client import AsyncEngine
from rollout.http.engine.mailbox import Mailbox
from rollout.http.native.generate_call import GenerateCall, in_item, num_sequences
from rollout.http.native.hooks import Journal, Recorder
from rollout.http.native.sample import Sample, SampleDelta
from rollout.http.native.sample_ends import failure_of, stop_of
from rollout.http.native.text_workers import TextWorkers
from rollout.http.native.time_limits import TimeLimits, TimeWatch
from rollout.http.observing.call_notes import note_samples
from rollout.masks.grammar.check import GrammarCheck
from rollout.masks.grammar.requested import grammar_field, in_field
from rollout.metrics import Metrics
from rollout.requests.expand import (
    check_top_entries,
    check_total,
    expand,
    num_sent,
    num_top_entries,
    with_seed,
)
from rollout.requests.outputs import coalesced
from rollout.requests.seeds import derive_seed
from rollout.scheduler.continued import num_given
from rollout.text.tokenizer import Tokenizer

P = ParamSpec("P")
T = TypeVar("T")
Body = TypeVar("Body", bytes, msgspec.Raw)

_MAX_CALL_TOKENS = 1 << 27

_INLINE_BYTES = 256 << 10
_INLINE_SEQUENCES = 64
_INLINE_SCORES = 8192
_INLINE_CHARS = 8192
_INLINE_IDS = 65_536


class Generator:
    """Expands calls into samples and drives them.

    workers: where long texts are encoded, beside the event loop. grammars: where they are tried.
    seed: requests without a `sampling_seed` get seeds derived from it and their number. limits: of
    their time.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        tokenizer: Tokenizer | None,
        metrics: Metrics,
        *,
        seed: int,
        limits: TimeLimits,
    ) -> None:
        self.engine = engine
        self._limits = limits
        self.tokenizer = tokenizer
        self._metrics = metrics
        self.seed = seed
        self._numbers = count()
        self.workers = TextWorkers()
        self.grammars = GrammarCheck(tokenizer)
        self._num_expanding = 0
        self._recorder: Recorder | None = None
        self._journal: Journal | None = None

    def seeded(self, seed: int) -> Generator:
        """The same, with seeds derived from `seed` and counted anew: what a call draws then depends
        on no other call."""
        other = copy(self)
        other.seed, other._numbers = seed, count()
        return other

    def recorded(self, recorder: Recorder) -> Generator:
        """The same, with every call shown to `recorder`."""
        other = copy(self)
        other._recorder = recorder
        return other

    def journaled(self, journal: Journal) -> Generator:
        """The same for one call, which may have begun elsewhere."""
        other = copy(self)
        other._journal = journal
        return other

    async def samples(self, call: GenerateCall) -> list[Sample]:
        """The sequences of a call, prompt-major. Raises InvalidRequest, naming the item of a
        batch or an id in use, EngineDead, NoVersion, QueueFull; nothing is submitted yet."""
        # Everything that can be refused is, before a stream has sent its status.
        self.engine.drain.check()
        self.engine.check_open()
        if self._recorder is not None:
            call = await self._recorder.began(call)
        samples = await self._expanded(call)
        await self._check_grammars(call, samples)
        self.engine.check_ids([sample.request.rid for sample in samples])
        if self._recorder is not None:
            self._recorder.sampling(samples)
        if self._journal is not None:
            self._journal.sampling(samples)
        note_samples(samples)
        return samples

    async def _check_grammars(self, call: GenerateCall, samples: Sequence[Sample]) -> None:
        """Raise InvalidRequest for the first item whose grammar cannot be served."""
        last = None
        for sample in samples:
            grammar = sample.request.grammar
            # Samples of one prompt have the same.
            if grammar is None or grammar is last:
                continue
            last = grammar
            try:
                await self.grammars.checked(grammar, self.engine.facts.vocab_size)
            except InvalidRequest as error:
                named = in_field(error, grammar_field(sample.wire))
                if not call.batch:
                    raise named from error
                rids = [item.rid for item in call.items]
                raise in_item(named, rids.index(sample.wire.rid)) from error

    async def _expanded(self, call: GenerateCall) -> list[Sample]:
        """The sequences; of a large call made beside the event loop."""
        facts = self.engine.facts
        count = num_sequences(call, facts)
        if len(call.items) > 1:
            many = any(item.sampling_params.n > 1 for item in call.items)
            name = "text" if call.items[0].input_ids is None else "input_ids"
            check_total(count, facts, field="n" if many else name)
        self.engine.check_room(count + self._num_expanding)
        num_ids = num_chars = 0
        for item in call.items:
            num_ids += len(item.input_ids or ())
            # Output tokens become text one by one, to find where it goes on.
            num_chars += len(item.text or "") + num_sent(item)
        small = count <= _INLINE_SEQUENCES and num_ids <= _INLINE_IDS
        if small and num_chars <= _INLINE_CHARS:
            return self._expand(call)
        self._num_expanding += count
        try:
            return await self.workers.run(self._expand, call)
        finally:
            self._num_expanding -= count

    async def parsed(
        self,
        parse: Callable[Concatenate[Body, P], T],
        body: Body,
        *args: P.args,
        **options: P.kwargs,
    ) -> T:
        """What `parse` makes of `body`; of a large one beside the event loop."""
        if len(body) <= _INLINE_BYTES:
            return parse(body, *args, **options)
        return await self.workers.run(parse, body, *args, **options)

    async def encoded(self, text: str, *, many: bool = False) -> list[int]:
        """Ids of `text` without special tokens; of a long one, or one of `many`, beside the
        event loop."""
        assert self.tokenizer is not None
        if not many and len(text) <= _INLINE_CHARS:
            return self.tokenizer.encode(text, add_special_tokens=False)
        return await self.workers.run(self.tokenizer.encode, text, add_special_tokens=False)

    async def written(
        self,
        write: Callable[Concatenate[Sample, P], T],
        sample: Sample,
        *args: P.args,
        **more: P.kwargs,
    ) -> T:
        """What `write` makes of a finished sample; of a large one beside the event loop."""
        if sample.num_scores <= _INLINE_SCORES:
            return write(sample, *args, **more)
        return await self.workers.run(write, sample, *args, **more)

    async def run(
        self, samples: Sequence[Sample]
    ) -> AsyncGenerator[tuple[Sample, SampleDelta], None]:
        """Submit the samples and yield what each output added, until all have finished.

        Closed and raising as `run_together`.
        """
        async with contextlib.aclosing(self.run_together(samples)) as together:
            async for pairs in together:
                for pair in pairs:
                    yield pair

    async def run_together(
        self, samples: Sequence[Sample]
    ) -> AsyncGenerator[list[tuple[Sample, SampleDelta]], None]:
        """Submit the samples and yield what outputs added, those that came together at once and at
        most one of a sample, until all have finished.

        Whoever iterates closes the generator (`contextlib.aclosing`), which aborts what still
        runs. Raises the typed error of a request that the engine refused, and of one whose
        logits were not finite, after the tokens it had before; EngineDead if the server leaves
        before any sample has a token.
        """
        open_samples = {sample.request.rid: sample for sample in samples}
        with self._loss_noted():
            for outputs in self._replayed():
                added, failure = await self._taken(open_samples, outputs)
                if added:
                    yield added
                if failure is not None:
                    raise failure
            if open_samples:
                mailbox = await self._submitted(open_samples)
                watch = self._limits.watch(self.engine, open_samples)
                try:
                    while open_samples:
                        added, failure = await self._taken(open_samples, await self._came(mailbox))
                        if added:
                            yield added
                        if failure is not None:
                            raise failure
                finally:
                    self._discard(mailbox, watch)
        self._check_begun(samples)

    async def finish(self, samples: Sequence[Sample]) -> None:
        """Run the samples to their end. Raises what `run_together` does."""
        if self._journal is not None:
            async with contextlib.aclosing(self.run_together(samples)) as outputs:
                async for _ in outputs:
                    pass
            return
        # As there, without a generator: this is the way of most short requests.
        open_samples = {sample.request.rid: sample for sample in samples}
        mailbox = await self._submitted(open_samples)
        watch = self._limits.watch(self.engine, open_samples)
        try:
            while open_samples:
                _, failure = await self._taken(open_samples, await self._came(mailbox))
                if failure is not None:
                    raise failure
        finally:
            self._discard(mailbox, watch)
        self._check_begun(samples)

    @contextlib.contextmanager
    def _loss_noted(self) -> Iterator[None]:
        """Have the journal know that the engine is gone."""
        try:
            yield
        except EngineDead as error:
            if self._journal is not None:
                self._journal.lost = error
            raise

    def _replayed(self) -> Iterable[list[RequestOutput]]:
        """Outputs that the samples got elsewhere, those that came together at once."""
        return () if self._journal is None else self._journal.replayed()

    async def _submitted(self, open_samples: Mapping[str, Sample]) -> Mailbox:
        """Where what comes of the samples arrives."""
        samples, journal = open_samples.values(), self._journal
        requests = [s.request if journal is None else journal.to_send(s) for s in samples]
        return await self.engine.submit_all(requests)

    def _discard(self, mailbox: Mailbox, watch: TimeWatch | None) -> None:
        """Nothing more of the call is wanted."""
        if watch is not None:
            watch.end()
        self.engine.discard(mailbox)

    async def _came(self, mailbox: Mailbox) -> list[RequestOutput]:
        """The next outputs, one of a sample."""
        outputs = coalesced(await mailbox.take())
        if self._journal is not None:
            await self._journal.record(outputs)
        return outputs

    async def _taken(
        self, open_samples: dict[str, Sample], outputs: Sequence[RequestOutput]
    ) -> tuple[list[tuple[Sample, SampleDelta]], SlipstreamError | None]:
        """What outputs add, and the error of the first sample that failed, behind which nothing is
        looked at. Takes those that finished out of `open_samples`."""
        added: list[tuple[Sample, SampleDelta]] = []
        failure = None
        for output in outputs:
            sample = open_samples[output.rid]
            stopped = sample.stop is not None
            delta = sample.take(output)
            if delta.finished:
                del open_samples[output.rid]
                await self._settle(sample)
                self._count(sample)
            elif sample.stop is not None and not stopped:
                self._post_stop(sample)
            failure = failure_of(sample)
            if failure is None or len(delta.output.token_ids):
                added.append((sample, delta))
            if failure is not None:
                break
        return added, failure

    def _check_begun(self, samples: Sequence[Sample]) -> None:
        """Raise EngineDead if the server leaves and none of the samples has a token."""
        leaving = self.engine.leaving
        if leaving is not None and not any(sample.first_at for sample in samples):
            raise leaving.copy()

    def _expand(self, call: GenerateCall) -> list[Sample]:
        samples: list[Sample] = []
        num_tokens = num_entries = 0
        many = call.batch or call.items[0].sampling_params.n > 1
        for number, item in enumerate(call.items):
            seed = derive_seed(self.seed, next(self._numbers))
            try:
                requests = expand(
                    item,
                    self.tokenizer,
                    self.engine.facts,
                    seed,
                    task=call.task,
                    pooling=call.pooling,
                    decoded=call.decoded,
                )
            except InvalidRequest as error:
                if not call.batch:
                    raise
                raise in_item(error, number) from error
            num_tokens += len(requests) * len(requests[0].prompt_ids)
            num_tokens += len(requests) * len(item.allowed_token_ids or ())
            num_tokens += len(requests) * _num_grammar_tokens(requests[0])
            num_tokens += sum(num_given(request) for request in requests)
            _check_tokens(num_tokens, "n" if len(requests) > 1 else "input_ids")
            num_entries += num_top_entries(requests[0], len(requests), self.engine.facts)
            check_top_entries(num_entries)
            wire = with_seed(item, seed)
            for request in requests:
                index = len(samples) if many else None
                samples.append(
                    Sample(wire, request, self.tokenizer, index=index, stream=call.stream)
                )
        return samples

    def _post_stop(self, sample: Sample) -> None:
        self.engine.post([stop_of(sample)])

    async def _settle(self, sample: Sample) -> None:
        """Have the engine know where a turn of a session ended, before its reply says so: it may
        have sampled beyond a stop string."""
        if sample.request.session and sample.stop is not None:
            await self.engine.send(stop_of(sample))

    def _count(self, sample: Sample) -> None:
        finish = sample.output.finish
        assert finish is not None
        self._metrics.finished(
            finish.type,
            started_at=sample.started_at,
            first_at=sample.first_at,
            queue_s=sample.output.queue_s,
            num_prompt=len(sample.request.prompt_ids),
            num_output=len(sample.output.token_ids),
        )


def _num_grammar_tokens(request: Request) -> int:
    """Tokens that take as many bytes as its grammar, in which a character is 4 at most."""
    return 0 if request.grammar is None else len(request.grammar.source)


def _check_tokens(count: int, field: str) -> None:
    """The engine gets a prompt, the tokens that are allowed and the grammar for every sample: 4
    bytes a token."""
    if count > _MAX_CALL_TOKENS:
        raise InvalidRequest(
            "the prompts, allowed_token_ids and grammars of all samples have more than "
            f"{_MAX_CALL_TOKENS} tokens together; send several calls",
            field=field,
        )
