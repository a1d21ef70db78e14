"""The breaker of a worker, and the budget of retries, by a clock of the test's own."""

from rollout.router.workers.breaker import FAILURES, REST_S, Breaker, RetryBudget


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def broken() -> tuple[Breaker, Clock]:
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(FAILURES):
        assert not breaker.is_open
        breaker.failed()
    return breaker, clock


def test_failures_in_a_row_open_it_and_one_try_closes_it() -> None:
    breaker, clock = broken()
    assert breaker.is_open and not breaker.half_open
    clock.now += REST_S
    assert breaker.half_open and not breaker.is_open
    breaker.begin_try()
    assert breaker.is_open and not breaker.half_open
    breaker.succeeded()
    assert not breaker.is_open and not breaker.half_open


def test_a_try_that_fails_doubles_the_rest() -> None:
    breaker, clock = broken()
    clock.now += REST_S
    breaker.begin_try()
    breaker.failed()
    clock.now += 1.5 * REST_S
    assert breaker.is_open
    clock.now += REST_S
    assert breaker.half_open


def test_failures_that_are_far_apart_open_nothing() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(10):
        breaker.failed()
        clock.now += 6.0
        assert not breaker.is_open


def test_many_that_fail_at_once_count_as_one_rest() -> None:
    breaker, clock = broken()
    for _ in range(100):
        breaker.failed()
    clock.now += REST_S
    assert breaker.half_open


def test_retries_are_a_share_of_requests() -> None:
    budget = RetryBudget(share=0.25, least=2.0)
    spent = sum(budget.spend() for _ in range(100))
    assert spent == 2
    for _ in range(40):
        budget.earn()
    assert sum(budget.spend() for _ in range(100)) == 10
