"""An executor without a model: the next token is a fixed function of the tokens before it.

Greedy and seedless, so that any test can say beforehand what must come out
(`expected_tokens`). Its weights are one number per version, added to every token, and its
updates obey the order of the real ones.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import EngineConfig
from engine.errors import (
    InvalidRequest,
    ManifestMismatch,
    ModelNotFound,
    OutOfMemory,
    ProfileOrder,
    SlipstreamError,
    UpdateOrder,
)
from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    BesideSteps,
    BitArray,
    CommitUpdate,
    EngineFacts,
    LoadFromDisk,
    Pooling,
    PromptEmbedding,
    PromptLogprobs,
    Reply,
    ResumeMemory,
    RouteArray,
    RowSampling,
    StartProfile,
    StepMasks,
    StepPlan,
    StepResult,
    StopProfile,
    TopLogprobs,
    UpdateReport,
    WeightCommand,
)
from tests.helpers.mock_routes import EXPERTS, PagedRoutes
from tests.helpers.sent_masks import SentMasks

VOCAB_SIZE = 300
EOS_ID = 299
NUM_PRINTABLE = 94
HIDDEN_SIZE = 8
POISON = 77
"""A prompt whose first token is POISON makes its step raise OutOfMemory."""
NOT_FINITE = 298
"""Logits after a prompt whose first token is NOT_FINITE are NaN from its third output token on, and
so is its embedding."""


def next_token(tokens: list[int], shift: int = 0, allowed: Sequence[int] = ()) -> int:
    """The token after `tokens`: in tests.helpers.tiny_tokenizer, a printable character. allowed: if
    there are any, the first of them from that token on, round the vocabulary."""
    token = (31 * tokens[-1] + 7 * len(tokens) + shift) % NUM_PRINTABLE
    return min(allowed, key=lambda one: (one - token) % VOCAB_SIZE, default=token)


def expected_tokens(
    prompt: list[int], count: int, shift: int = 0, allowed: Sequence[int] = ()
) -> list[int]:
    """The first `count` output tokens after `prompt`."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, shift, allowed))
    return tokens[len(prompt) :]


def expected_embedding(prompt: list[int], pooling: Pooling = "last") -> np.ndarray:
    """The embedding of `prompt`, float32 [HIDDEN_SIZE]."""
    tokens = np.array(prompt, np.float64)[:, None]
    states = np.sin(tokens * np.arange(1, HIDDEN_SIZE + 1) + 1)
    found: np.ndarray = (states[-1] if pooling == "last" else states.mean(0)).astype(np.float32)
    return found


def tokens_of(bits: BitArray) -> list[int]:
    """The tokens that a mask allows, ascending."""
    found: list[int] = np.flatnonzero(
        np.unpackbits(bits.view(np.uint8), bitorder="little")
    ).tolist()
    return found


@dataclass(frozen=True)
class FakePending:
    """A launched step: its result or its error."""

    outcome: StepResult | SlipstreamError

    def result(self) -> StepResult:
        """The result; raises the error."""
        if isinstance(self.outcome, SlipstreamError):
            raise self.outcome
        return self.outcome


@dataclass
class FakeMasked:
    """A launched step whose sampling waits for its masks."""

    plan: StepPlan
    error: SlipstreamError | None = None
    outcome: StepResult | None = None

    def result(self) -> StepResult:
        """The result, once the masks came; raises the error."""
        if self.error is not None:
            raise self.error
        assert self.outcome is not None, f"no masks came for step {self.plan.step}"
        return self.outcome


@dataclass(frozen=True)
class Answered:
    """A command that has ended: its reply or its error."""

    outcome: Reply | Exception

    def done(self) -> bool:
        """It has."""
        return True

    def result(self) -> Reply:
        """The reply; raises the error."""
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class FakeExecutor:
    """See the module. `model` "experts" has some, and keeps their routes where its configuration
    says so; "missing" is not found, "exit" leaves the process while it
    loads, "lasting" gives no memory back, "raise" raises what is no error of ours, "hang" sleeps
    in its first step, "die" leaves in it."""

    def __init__(self, config: EngineConfig) -> None:
        if config.model == "missing":
            raise ModelNotFound("no model at missing", field="model")
        if config.model == "exit":
            os._exit(3)
        if config.model == "raise":
            raise ZeroDivisionError("the cause")
        self.facts = EngineFacts(
            model=config.model,
            num_pages=config.cache.num_pages or 256,
            page_size=config.cache.page_size,
            context_length=config.context_length or 512,
            vocab_size=VOCAB_SIZE,
            eos_ids=[EOS_ID],
            dtype="float32",
            device="cpu",
            attention="fake",
            collectives="one rank",
            architecture="FakeForCausalLM",
            model_type="fake",
            releases=config.model != "lasting",
            hidden_size=HIDDEN_SIZE,
            experts=EXPERTS if config.model == "experts" else None,
            keeps_routes=config.return_routed_experts,
        )
        self._routes: PagedRoutes | None = None
        if config.return_routed_experts:
            self._routes = PagedRoutes(self.facts.num_pages, self.facts.page_size)
        self.closed = False
        self._rows: dict[int, list[int]] = {}
        self._prompts: dict[int, tuple[int, int]] = {}
        self._sampling: dict[int, RowSampling] = {}
        self._pooling: dict[int, Pooling | None] = {}
        self._shift = 0
        self._waits: FakeMasked | None = None
        self._masks = SentMasks()
        self._open: BeginUpdate | None = None
        self._staged = 0
        self._undefined = False
        self._profiling = False
        self._read: RouteArray | None = None

    def execute(self, plan: StepPlan) -> StepResult:
        """Append one token to each row that samples."""
        assert len(plan.masked) == 0, "its masks have not come"
        self._enter(plan)
        return self._sample(plan, {})

    def _enter(self, plan: StepPlan) -> None:
        self._waits = None
        for row in plan.new_rows:
            self._rows[row.slot] = row.token_ids.tolist()
            self._prompts[row.slot] = (row.prompt_logprob_start, row.prompt_len)
            self._sampling[row.slot] = row.sampling
            self._pooling[row.slot] = row.pooling
        self._read = None
        if self._routes is not None:
            self._read = self._routes.step(plan, self._rows, self._shift)
        self._misbehave(plan)

    def _sample(self, plan: StepPlan, allowed: dict[int, list[int]]) -> StepResult:
        tokens = []
        for row, slot in enumerate(plan.slots[plan.samples].tolist()):
            self._rows[slot].append(self._next(slot, allowed.get(row, ())))
            tokens.append(self._rows[slot][-1])
        token_ids = np.array(tokens, np.int32)
        return StepResult(
            step=plan.step,
            token_ids=token_ids,
            logprobs=np.where(self._broken(plan), np.float32(np.nan), _logprobs(token_ids)),
            top=self._top_of(plan, token_ids),
            prompt=self._prompt_logprobs(plan),
            entropies=self._entropies(plan, token_ids),
            embeddings=self._embeddings(plan),
            routes=self._read,
        )

    def _next(self, slot: int, allowed: Sequence[int]) -> int:
        return next_token(self._rows[slot], self._shift, allowed)

    def launch(self, plan: StepPlan) -> FakePending | FakeMasked:
        """Run the step at once; an error comes where it would from a GPU, with the result."""
        if len(plan.masked):
            return self._launch_masked(plan)
        try:
            return FakePending(self.execute(plan))
        except SlipstreamError as error:
            return FakePending(error)

    def _launch_masked(self, plan: StepPlan) -> FakeMasked:
        waits = FakeMasked(plan)
        try:
            self._enter(plan)
        except SlipstreamError as error:
            waits.error = error
        self._waits = waits
        return waits

    def mask(self, masks: StepMasks) -> None:
        """Sample in the step that waits."""
        waits, self._waits = self._waits, None
        assert waits is not None and waits.plan.step == masks.step, "no step waits for these masks"
        assert set(masks.rows.tolist()) <= set(waits.plan.masked.tolist())
        allowed = {row: tokens_of(bits) for row, bits in self._masks.enter(masks).items()}
        if waits.error is None:
            waits.outcome = self._sample(waits.plan, allowed)

    def handle(self, command: WeightCommand) -> Reply:
        """The update protocol over one number."""
        match command:
            case BeginUpdate():
                if self._open is not None:
                    raise UpdateOrder("an update is open", field="version")
                self._open = command
            case LoadFromDisk():
                number = Path(command.path).name.removeprefix("step_")
                if not number.isascii() or not number.removeprefix("-").isdecimal():
                    raise InvalidRequest(f"no folder at {command.path}", field="path")
                self.receive([("shift", int(number))])
            case CommitUpdate():
                if self._open is None:
                    raise UpdateOrder("no update is open", field="version")
                partial, self._open, self._shift = self._open.partial, None, self._staged
                self._undefined = self._undefined and partial
                report = UpdateReport(
                    version=command.version, num_tensors=1, num_bytes=8, seconds=0.0
                )
                return Reply(report=report, refusal="undefined" if self._undefined else "")
            case StartProfile() | StopProfile():
                return self._profile(command)
            case ResumeMemory():
                # As without a backup; a number that is published whole is defined again.
                self._undefined = True
            case AbortUpdate():
                self._open = None
        return Reply()

    def _profile(self, command: StartProfile | StopProfile) -> Reply:
        started = isinstance(command, StartProfile)
        if started == self._profiling:
            raise ProfileOrder("out of order", field="profile")
        self._profiling = started
        return Reply() if started else Reply(traces=["/traces/fake-TP-0.trace.json.gz"])

    def start(self, command: BesideSteps) -> Answered:
        """Run it at once."""
        try:
            return Answered(self.handle(command))
        except Exception as error:
            return Answered(error)

    def cancel(self, reason: str, *, group: str = "") -> None:
        """Nothing runs beside anything here."""

    def receive(self, tensors: Iterable[tuple[str, Any]], *, lasting: bool = False) -> None:
        """Takes one tensor, named "shift"."""
        for name, value in tensors:
            if name != "shift":
                raise ManifestMismatch(f"unknown tensor {name}", field=name)
            self._staged = int(value)

    def close(self) -> None:
        """Note that it was called."""
        self.closed = True

    def _misbehave(self, plan: StepPlan) -> None:
        if self.facts.model == "hang":
            time.sleep(600)
        if self.facts.model == "die":
            os._exit(5)
        if any(self._rows[slot][0] == POISON for slot in plan.slots.tolist()):
            raise OutOfMemory("no room for the logits", field="rank 0")

    def _broken(self, plan: StepPlan) -> np.ndarray:
        slots = plan.slots[plan.samples].tolist()
        rows = [(self._rows[slot], self._prompts[slot][1]) for slot in slots]
        wrong = [tokens[0] == NOT_FINITE and len(tokens) - size > 2 for tokens, size in rows]
        return np.array(wrong, np.bool_)

    def _top_of(self, plan: StepPlan, token_ids: np.ndarray) -> TopLogprobs | None:
        asked = [self._sampling[slot] for slot in plan.slots[plan.samples].tolist()]
        return _top(token_ids, asked)

    def _entropies(self, plan: StepPlan, token_ids: np.ndarray) -> np.ndarray | None:
        wanted = any(self._sampling[slot].entropy for slot in plan.slots[plan.samples].tolist())
        return (token_ids / 50).astype(np.float32) if wanted else None

    def _embeddings(self, plan: StepPlan) -> list[PromptEmbedding]:
        found = []
        for row, (slot, kv_len) in enumerate(zip(plan.slots.tolist(), plan.kv_lens, strict=True)):
            pooling, tokens = self._pooling[slot], self._rows[slot]
            if pooling is None or kv_len < len(tokens):
                continue
            values = expected_embedding(tokens, pooling)
            found.append(
                PromptEmbedding(row, values * np.nan if tokens[0] == NOT_FINITE else values)
            )
        return found

    def _prompt_logprobs(self, plan: StepPlan) -> list[PromptLogprobs]:
        found = []
        rows = zip(plan.slots.tolist(), plan.query_lens, plan.kv_lens, strict=True)
        for row, (slot, query_len, kv_len) in enumerate(rows):
            start, prompt_len = self._prompts[slot]
            first = max(start, 1, int(kv_len - query_len) + 1)
            end = min(prompt_len, int(kv_len) + 1)
            if start < 0 or first >= end:
                continue
            ids = np.array(self._rows[slot][first:end], np.int32)
            top = _top(ids, [self._sampling[slot]] * len(ids))
            found.append(PromptLogprobs(row, first, _logprobs(ids), top))
        return found


def _logprobs(ids: np.ndarray) -> np.ndarray:
    return (-ids / 100).astype(np.float32)


def _top(ids: np.ndarray, asked: list[RowSampling]) -> TopLogprobs | None:
    """For each of `ids`: itself and those after it as the likeliest, and those that were named."""
    width = max((sampling.num_alternatives for sampling in asked), default=0)
    if width == 0:
        return None
    found = np.zeros((len(ids), width), np.int32)
    for row, (token, sampling) in enumerate(zip(ids.tolist(), asked, strict=True)):
        likeliest = [(token + i) % VOCAB_SIZE for i in range(sampling.top_logprobs)]
        found[row, : sampling.num_alternatives] = [*likeliest, *sampling.logprob_ids]
    return TopLogprobs(found, _logprobs(found))


def build(config: EngineConfig) -> FakeExecutor:
    """The factory a spawned leader is given by name."""
    return FakeExecutor(config)
