"""`rate_limits`: a provider's buckets, as its headers describe them."""

from __future__ import annotations

import pytest

from asyncembed.sending.rate_limits import Bucket, bucket_from_headers, refill_rate

# A bucket of 100,000 that refills by 5,000 a second, described by headers in several ways.


def test_two_replies_give_the_refill_rate_and_the_capacity_for_any_limit() -> None:
    # the limit is for a minute, the bucket holds less: 90,000 left, full in 2 s; then 40,000, full in 12 s
    first = bucket_from_headers(None, 300_000, 90_000, 2.0, taken=500, unseen=0, now=0.0)
    second = bucket_from_headers(first, 300_000, 40_000, 12.0, taken=500, unseen=7_000, now=50.0)
    assert (second.per_s, second.capacity, second.level, second.at) == (5_000, 100_000, 33_000, 50.0)


def test_one_reply_gives_them_if_the_bucket_was_full_before() -> None:
    bucket = bucket_from_headers(None, 100_000, 60_000, 8.0, taken=40_000, unseen=0, now=0.0)
    assert (bucket.per_s, bucket.capacity, bucket.level) == (5_000, 100_000, 60_000)


@pytest.mark.parametrize(
    ("remaining", "reset_s"),
    [
        pytest.param(100_000, 0.0, id="full"),
        pytest.param(60_000, None, id="no reset"),
        pytest.param(60_000, 8.0, id="others have taken some before"),
        pytest.param(99_999, 360.0, id="the guide's own example: 6m0s for hardly anything"),
    ],
)
def test_until_then_the_bucket_refills_by_its_limit_in_a_minute(remaining: int, reset_s: float | None) -> None:
    bucket = bucket_from_headers(None, 100_000, remaining, reset_s, taken=0.5, unseen=0, now=0.0)
    assert bucket.per_s == pytest.approx(100_000 / 60)


@pytest.mark.parametrize(
    ("remaining", "reset_s"),
    [
        pytest.param(40_000, 1.0, id="a reset that runs down: a window, not a bucket"),
        pytest.param(89_000, 2.2, id="too close"),
        pytest.param(40_000, 2.0, id="a constant"),
    ],
)
def test_a_reset_that_means_something_else_does_not_change_the_refill_rate(remaining: int, reset_s: float) -> None:
    first = bucket_from_headers(None, 100_000, 90_000, 2.0, taken=500, unseen=0, now=0.0)
    assert bucket_from_headers(first, 100_000, remaining, reset_s, taken=500, unseen=0, now=1.0).per_s == first.per_s


def test_a_bucket_is_never_above_its_capacity_and_may_be_below_zero() -> None:
    bucket = Bucket(per_s=10, capacity=100, level=100, at=0.0)
    assert bucket.wait_s(100, now=1_000.0) == 0
    bucket.take(150, now=1_000.0)
    assert bucket.level == -50
    # from -50 to 100 at 10 a second, and a little more for the clocks
    assert bucket.wait_s(100, now=1_000.0) == pytest.approx(15, rel=0.01)


def test_a_fixed_window_is_waited_for_until_it_restarts() -> None:
    bucket = bucket_from_headers(None, 10, 0, 0.5, taken=1, unseen=0, now=0.0)
    assert 0.5 <= bucket.wait_s(1, now=0.0) < 0.6
    assert bucket.wait_s(1, now=0.5) == 0
    again = bucket_from_headers(
        bucket, 10, 4, 0.9, taken=1, unseen=3, now=0.6
    )  # no refill rate can be computed from these
    assert again.wait_s(1, now=0.6) == 0
    assert again.wait_s(2, now=0.6) < 1


@pytest.mark.parametrize(
    ("remaining", "reset_s", "per_s"),
    [
        pytest.param(40_000, 12.0, 5_000, id="50,000 fewer, full 10 s later"),
        pytest.param(100_000, 0.0, 5_000, id="fuller, and full earlier"),
        pytest.param(40_000, None, None, id="no reset"),
        pytest.param(89_000, 2.2, None, id="levels too close"),
        pytest.param(40_000, 2.01, None, id="resets too close"),
        pytest.param(40_000, 1.0, None, id="fewer left, but full earlier"),
    ],
)
def test_the_refill_rate_is_the_slope_between_two_replies(
    remaining: int, reset_s: float | None, per_s: float | None
) -> None:
    assert refill_rate((90_000, 2.0), remaining, reset_s) == per_s
