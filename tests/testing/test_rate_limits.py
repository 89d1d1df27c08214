"""Token buckets and durations, with times passed in by the tests."""

from __future__ import annotations

import pytest

from asyncembed.testing.rate_limits import ServerRateLimits, TokenBucket, go_duration


def test_a_bucket_starts_full_and_refills_continuously() -> None:
    bucket = TokenBucket(per_minute=60, capacity=10)
    assert bucket.take(10, 100.0) == 0
    assert bucket.take(1, 100.0) == pytest.approx(1)  # one a second
    assert bucket.take(1, 100.5) == pytest.approx(0.5)  # a refusal takes nothing
    assert bucket.take(1, 101.0) == 0
    assert bucket.level(1_000.0) == 10  # the capacity is never exceeded


def test_the_wait_of_a_bucket_is_exactly_long_enough() -> None:
    bucket = TokenBucket(per_minute=600_000, capacity=100_000)
    assert bucket.take(100_000, 0.0) == 0
    wait_s = bucket.take(12_345, 0.0)
    assert bucket.take(12_345, wait_s * 0.999) > 0
    assert bucket.take(12_345, wait_s + 1e-9) == 0


def test_a_bucket_returns_the_time_until_it_is_full_again() -> None:
    bucket = TokenBucket(per_minute=60, capacity=60)
    bucket.take(30, 0.0)
    assert bucket.full_in_s(0.0) == pytest.approx(30)
    assert bucket.full_in_s(20.0) == pytest.approx(10)


def test_a_request_for_more_than_the_bucket_holds_has_no_wait() -> None:
    rates = ServerRateLimits(None, 60_000, burst_s=60)
    exceeded = rates.take("tokens", 60_001, 0.0)
    assert exceeded is not None
    assert (exceeded.limit, exceeded.requested, exceeded.wait_s) == (60_000, 60_001, None)
    assert rates.take("tokens", 60_000, 0.0) is None


def test_a_shorter_burst_makes_a_smaller_bucket_with_the_same_refill() -> None:
    rates = ServerRateLimits(None, 60_000, burst_s=2)
    assert rates.take("tokens", 2_000, 0.0) is None  # 1,000 a second for 2 s
    exceeded = rates.take("tokens", 1_000, 0.0)
    assert exceeded is not None
    assert exceeded.wait_s == pytest.approx(1)
    assert rates.headers(0.0)["x-ratelimit-limit-tokens"] == "60000"


def test_a_bucket_that_starts_empty_grants_only_its_refill() -> None:
    rates = ServerRateLimits(None, 60_000, burst_s=60, filled=0)
    exceeded = rates.take("tokens", 500, 10.0)
    assert exceeded is not None
    assert (exceeded.limit, exceeded.used, exceeded.wait_s) == (60_000, 60_000, pytest.approx(0.5))
    assert rates.take("tokens", 500, 10.5) is None
    assert rates.take("tokens", 1, 10.5) is not None


def test_the_headers_name_only_the_limits_that_are_set() -> None:
    rates = ServerRateLimits(600, None, burst_s=60)
    rates.take("requests", 1, 0.0)
    assert rates.headers(0.0) == {
        "x-ratelimit-limit-requests": "600",
        "x-ratelimit-remaining-requests": "599",
        "x-ratelimit-reset-requests": "100ms",
    }
    assert rates.take("tokens", 10**9, 0.0) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (-1, "0s"),
        (0.0004, "0s"),
        (0.017, "17ms"),
        (0.9999, "1s"),
        (1, "1s"),
        (2.812, "2.812s"),
        (59.999, "59.999s"),
        (59.9999, "1m0s"),
        (62.5, "1m2.5s"),
        (360, "6m0s"),
        (3_600, "1h0m0s"),
        (3_725.25, "1h2m5.25s"),
    ],
)
def test_durations_are_formatted_as_in_go(seconds: float, text: str) -> None:
    assert go_duration(seconds) == text
