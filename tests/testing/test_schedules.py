"""Schedules give faults to the right requests."""

from __future__ import annotations

import pytest

from asyncembed.testing import (
    Fault,
    Hang,
    InvalidInput,
    LoggedRequest,
    QuotaExceeded,
    Schedule,
    ServerFault,
    SlowDown,
    UnsupportedValue,
    every,
    first_of,
    mixed,
    outage,
    poison,
    script,
)


def run(schedule: Schedule, count: int, *texts: str, step_s: float = 1.0) -> list[Fault | None]:
    """Return the faults of requests 1 to `count`, `step_s` apart, all with the same texts."""
    requests = [
        LoggedRequest(number, number * step_s, "/v1/embeddings", {}, texts=texts) for number in range(1, count + 1)
    ]
    return [schedule(request) for request in requests]


def test_a_script_gives_its_faults_in_order_and_then_the_default() -> None:
    assert run(script([SlowDown(), None, Hang()]), 5) == [SlowDown(), None, Hang(), None, None]
    assert run(script([None], then=QuotaExceeded()), 3) == [None, QuotaExceeded(), QuotaExceeded()]


def test_every_third_request_fails() -> None:
    assert run(every(3, ServerFault()), 7) == [None, None, ServerFault(), None, None, ServerFault(), None]


def test_an_interval_of_zero_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="n is 0"):
        every(0, ServerFault())


def test_a_mix_depends_only_on_its_seed() -> None:
    first, again, other = (run(mixed(rate=0.3, seed=seed), 1_000) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert 250 < sum(fault is not None for fault in first) < 350
    assert len({type(fault) for fault in first}) > 8


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_mix_can_fail_no_request_or_all(rate: float) -> None:
    assert all((fault is not None) == bool(rate) for fault in run(mixed(rate=rate), 200))


def test_a_poisonous_text_fails_the_request_that_contains_it() -> None:
    for schedule in (poison("bad"), poison(["bad", "worse"]), poison(lambda text: text.startswith("b"))):
        assert run(schedule, 1, "good", "bad") == [InvalidInput()]
        assert run(schedule, 1, "good") == [None]
    assert run(poison("bad", UnsupportedValue()), 1, "bad") == [UnsupportedValue()]


def test_an_outage_starts_with_a_request_and_ends_by_the_clock() -> None:
    down = ServerFault(503)
    assert run(outage(2.5, down), 5) == [down, down, down, None, None]
    assert run(outage(2.0, down, after=1), 5) == [None, down, down, None, None]


def test_the_first_schedule_with_a_fault_wins_and_all_see_every_request() -> None:
    schedule = first_of(every(2, SlowDown()), script([Hang(), Hang(), Hang()]))
    assert run(schedule, 4) == [Hang(), SlowDown(), Hang(), SlowDown()]
