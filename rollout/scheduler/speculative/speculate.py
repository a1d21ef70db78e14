"""How many tokens to draft for each row of the next step."""

from __future__ import annotations

import time
from collections.abc import Callable

from engine.config import DRAFT_LADDER, MAX_VERIFY_ROWS, SpeculativeConfig
from engine.errors import UnsupportedOption
from engine.protocol import IntArray
from rollout.scheduler.speculative.acceptance import Acceptance
from rollout.scheduler.speculative.allowance import Allowance
from rollout.scheduler.speculative.drafts import Controller
from rollout.scheduler.speculative.ladder import rung_of, rungs
from rollout.scheduler.speculative.probes import Probes
from rollout.scheduler.speculative.rehearsal import Rehearsals
from rollout.scheduler.speculative.step_times import MeasuredCosts, ModelCosts, StepCosts
from rollout.scheduler.speculative.verify_cost import cost_model

ON_ABOVE = 1.05
"""Tokens a second over those of plain steps, from which drafting is taken up."""
OFF_BELOW = 1.02
"""Where it is given up."""
_SWITCH_ABOVE = 1.02
"""By how much another draft length must be better than the one in use."""
_SURPRISE = 1.25
_HOPED_RATE = 0.7
_RISKED_STEPS = 3.0
_REMEMBERED_ROWS = 8.0


def build_controller(
    config: SpeculativeConfig, *, device: str, clock: Callable[[], float] = time.monotonic
) -> Controller:
    """The controller that the scheduler of a replica asks.

    device: `EngineFacts.device`. clock: seconds; never read where `config.pace` is 'counts'.
    Raises UnsupportedOption for a drafter that is not there.
    """
    if config.method == "off":
        return FixedDrafts(0)
    if config.method == "ngram":
        return FixedDrafts(config.draft_tokens)
    if config.method != "auto":
        raise UnsupportedOption(
            f"there is no drafter {config.method!r} yet; use 'ngram' or 'auto'", field="speculative"
        )
    model = cost_model(device)
    costs = MeasuredCosts(model, clock) if config.pace == "time" else ModelCosts(model)
    return AdaptiveDrafts(costs, config.draft_tokens)


class FixedDrafts:
    """As many as configured, or as the number of rows allows."""

    def __init__(self, draft_tokens: int) -> None:
        self._draft_tokens = draft_tokens

    def choose(self, num_rows: int) -> int:
        """See `Controller`."""
        if num_rows * (rung_of(self._draft_tokens) + 1) <= MAX_VERIFY_ROWS:
            return self._draft_tokens
        return max(rungs(num_rows, self._draft_tokens), default=0)

    def planned(self, step: int, num_rows: int, k: int) -> None:
        """Nothing to learn."""

    def observe(self, step: int, counts: IntArray) -> None:
        """Nothing to learn."""


class AdaptiveDrafts:
    """The draft length that gives most tokens in a unit of time, or none where plain steps do.

    Expected tokens of a step come from the acceptance by depth, its cost from `costs`. Drafting
    begins at a gain of 5% and ends below 2%. While it is off, probes look whether it would pay;
    while it is on, plain steps are measured again. An allowance pays for all of that, and ends
    drafting that loses whatever the estimates say.
    """

    def __init__(self, costs: StepCosts, draft_tokens: int) -> None:
        self._costs = costs
        self._draft_tokens = draft_tokens
        self._acceptance = Acceptance(max(DRAFT_LADDER))
        self._allowance = Allowance()
        self._probes = Probes()
        self._rehearsals = Rehearsals()
        self._planned: dict[int, tuple[int, int]] = {}
        self._current = 0

    def choose(self, num_rows: int) -> int:
        """See `Controller`."""
        options = rungs(num_rows, self._draft_tokens)
        if not options:
            return 0
        before, self._current = self._current, self._decide(num_rows, options)
        if self._current:
            self._probes.succeed()
            return self._rehearse(num_rows, options)
        if before:
            self._probes.end()  # It no longer pays.
        return self._probe(num_rows, options)

    def planned(self, step: int, num_rows: int, k: int) -> None:
        """See `Controller`."""
        self._planned[step] = (num_rows, k)
        k = rung_of(k)
        self._costs.planned(step, num_rows, k)
        self._probes.planned(k)
        self._rehearsals.planned(num_rows, k)

    def observe(self, step: int, counts: IntArray) -> None:
        """See `Controller`."""
        self._costs.observed(step)
        if step not in self._planned:
            return
        num_rows, k = self._planned[step]
        self._planned = {later: kept for later, kept in self._planned.items() if later > step}
        counts = counts[counts > 0]  # The others had ended before the step ran.
        if k and len(counts):
            self._acceptance.observe(counts - 1, k)
            k = rung_of(k)
            self._probes.observe(len(counts), k)
        if len(counts) and self._costs.known(num_rows, 0):
            plain, cost = self._costs.latest(num_rows, 0), self._costs.latest(num_rows, k)
            self._allowance.step(cost, plain)
            if k:
                self._allowance.settle(int(counts.sum()) / len(counts) * plain - cost, plain)

    def _decide(self, num_rows: int, options: tuple[int, ...]) -> int:
        """The draft length in use from now on; 0 for none."""
        plain = self._costs.cost(num_rows, 0)
        if self._current and self._allowance.overdrawn(plain):
            self._acceptance.forget(0.0)  # What it promised did not come.
            return 0
        gains = {
            k: self._acceptance.tokens(k) * plain / self._costs.cost(num_rows, k) for k in options
        }
        best = max(options, key=gains.__getitem__)
        if gains[best] < (OFF_BELOW if self._current else ON_ABOVE):
            return 0
        if gains[best] < _SWITCH_ABOVE * gains.get(self._current, 0.0):
            return self._current
        return best

    def _rehearse(self, num_rows: int, options: tuple[int, ...]) -> int:
        """The length in use, or another one that is to be measured again."""
        rehearsals, current = self._rehearsals, self._current
        usual = self._costs.cost(num_rows, current)
        surprised = self._costs.latest(num_rows, current) > _SURPRISE * usual
        for k in (0, *options) if self._costs.measures else options:
            if k == current:
                continue
            running = rehearsals.running(num_rows, k)
            if not running and not rehearsals.due(num_rows, k, surprised=surprised):
                continue
            if self._bearable(num_rows, k):
                if not running:
                    rehearsals.start(num_rows, k)
                return k
        return current

    def _probe(self, num_rows: int, options: tuple[int, ...]) -> int:
        probes = self._probes
        if probes.k:
            if probes.k in options and not probes.complete and self._allowance.covers(0.0):
                return probes.k
            probes.end()
        if not probes.due or not self._costs.known(num_rows, 0):
            return 0
        bearable = [k for k in options if self._bearable(num_rows, k)]
        if not bearable:
            return 0
        k = self._probed_length(num_rows, bearable)
        self._acceptance.forget(_REMEMBERED_ROWS)
        probes.start(k)
        return k

    def _probed_length(self, num_rows: int, options: list[int]) -> int:
        """The most promising one; of measured costs, whose estimates may be wrong, every other time
        the one that was not tried for longest."""
        if self._costs.measures and self._probes.num_failed % 2:
            return self._rehearsals.oldest(options)
        return max(options, key=lambda k: _hoped_tokens(k) / self._costs.cost(num_rows, k))

    def _bearable(self, num_rows: int, k: int) -> bool:
        """Whether a few steps of `k` drafts may be tried."""
        loss = self._costs.cost(num_rows, k) - self._costs.cost(num_rows, 0)
        return k == 0 or self._allowance.covers(_RISKED_STEPS * loss)


def _hoped_tokens(k: int) -> float:
    return sum(_HOPED_RATE**depth for depth in range(k + 1))
