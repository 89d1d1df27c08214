"""A provider's token and request buckets, as its `x-ratelimit-…` headers describe them. Pure."""

from __future__ import annotations

from dataclasses import dataclass

# Clocks and roundings of two machines differ: wait a little longer than the arithmetic says.
WAIT_MARGIN_S = 0.002


WAIT_MARGIN = 1.005


@dataclass(slots=True)
class Bucket:
    """A bucket as a provider keeps it: `level` of `capacity` left at time `at`, refilled by `per_s` a second.

    Pure: it is told the time.
    """

    per_s: float
    capacity: float
    level: float
    at: float
    told: tuple[float, float] | None = None
    """An earlier answer's `remaining` and `reset`."""
    is_guess: bool = False
    """Whether `per_s` is no more than the limit over a minute,"""
    full_at: float | None = None
    """and if so, when the provider says the bucket is full: a window that begins anew tells nothing else."""

    def wait_s(self, amount: float, now: float) -> float:
        """Return the seconds until so much can be taken; what is larger than the bucket waits for it to be full."""
        missing = min(amount, self.capacity) - self._level(now)
        if missing <= 0:
            return 0.0
        seconds = missing / self.per_s * WAIT_MARGIN
        if self.full_at is not None and self.full_at > self.at:
            seconds = min(seconds, max(0.0, self.full_at - now))
        return seconds + WAIT_MARGIN_S

    def take(self, amount: float, now: float) -> None:
        self.level, self.at = self._level(now) - amount, now

    def _level(self, now: float) -> float:
        if self.full_at is not None and self.at < self.full_at <= now:
            return self.capacity
        return min(self.capacity, self.level + (now - self.at) * self.per_s)


def learn(
    old: Bucket | None, limit: int, remaining: int, reset_s: float | None, taken: float, unseen: float, now: float
) -> Bucket:
    """Return the bucket an answer's headers describe.

    `reset` is the time until the bucket is full, so `capacity = remaining + per_s * reset`: two answers give the refill
    and the capacity, whatever span `limit` is meant for. Until there are two, the bucket was full before this request
    if that fits, and else refills by its limit in a minute.

    Args:
        old: What was known before.
        limit: The limit as it was told.
        remaining: What was left when the answer was made.
        reset_s: Seconds until the bucket is full again.
        taken: What the request itself took.
        unseen: What has been sent since and is not in `remaining` yet.
        now: The time.
    """
    per_s = _slope(old.told, remaining, reset_s) if old is not None and old.told is not None else None
    is_guess = False
    if per_s is None and old is not None:
        per_s, is_guess = old.per_s, old.is_guess
    if per_s is None:
        missing = limit - remaining
        was_full = 0 < missing <= 1.05 * taken and reset_s is not None and reset_s >= _LEAST_RESET_S
        per_s, is_guess = (missing / reset_s, False) if was_full and reset_s else (limit / 60, True)
    capacity = limit if reset_s is None else min(limit, remaining + per_s * reset_s)
    told: tuple[float, float] | None = None if reset_s is None else (remaining, reset_s)
    if old is not None and old.told is not None and (told is None or old.told[0] > told[0]):
        told = old.told  # the fuller one: the further apart two answers are, the more exact is the slope
    full_at = now + reset_s if is_guess and reset_s is not None else None
    return Bucket(per_s, max(capacity, 1.0), remaining - unseen, now, told, is_guess, full_at)


# Resets are told in milliseconds at best.
_LEAST_RESET_S = 0.02


def _slope(told: tuple[float, float], remaining: float, reset_s: float | None) -> float | None:
    if reset_s is None:
        return None
    fuller, sooner_s = told
    less, later_s = fuller - remaining, reset_s - sooner_s
    if abs(later_s) < _LEAST_RESET_S or abs(less) < 0.05 * max(fuller, remaining) or less * later_s <= 0:
        return None  # too close to tell, or a reset that means something else
    return less / later_s
