"""Computes a provider's token and request buckets from the numbers in its `x-ratelimit-…` headers. Pure.

`providers.responses` reads the headers, and 429s; `pacing` waits for the buckets.
"""

from __future__ import annotations

from dataclasses import dataclass

# Clocks and rounding differ between two machines: wait a little longer than computed.
WAIT_MARGIN_S = 0.002
WAIT_MARGIN = 1.005

# Resets are given in milliseconds at best.
_LEAST_RESET_S = 0.02


@dataclass(slots=True)
class Bucket:
    """A token bucket: at time `at`, `level` of `capacity` is left; it refills by `per_s` per second."""

    per_s: float
    capacity: float
    level: float
    at: float
    earlier: tuple[float, float] | None = None
    """An earlier answer's `remaining` and `reset`."""
    is_guess: bool = False
    """Whether `per_s` is only assumed: the limit divided by a minute."""
    full_at: float | None = None
    """If it is assumed, when the bucket will be full according to the provider. A fixed window reports nothing else."""

    def wait_s(self, amount: float, now: float) -> float:
        """Return the seconds until `amount` can be taken. For more than the capacity, the bucket must be full."""
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


def bucket_from_headers(
    old: Bucket | None, limit: int, remaining: int, reset_s: float | None, taken: float, unseen: float, now: float
) -> Bucket:
    """Return the bucket that an answer's headers describe.

    `reset` is the time until the bucket is full, so `capacity = remaining + per_s * reset`. Two answers therefore give
    refill and capacity, whatever period `limit` refers to. After a single answer, the bucket is assumed to have been
    full before this request, if the numbers fit; otherwise it is assumed to refill by `limit` per minute.

    `old` is the bucket known so far, `taken` the amount that this request took, and `unseen` the amount that later
    requests took, which `remaining` does not include yet.
    """
    per_s = refill_rate(old.earlier, remaining, reset_s) if old is not None and old.earlier is not None else None
    is_guess = False
    if per_s is None and old is not None:
        per_s, is_guess = old.per_s, old.is_guess
    if per_s is None:
        missing = limit - remaining
        was_full = 0 < missing <= 1.05 * taken and reset_s is not None and reset_s >= _LEAST_RESET_S
        per_s, is_guess = (missing / reset_s, False) if was_full and reset_s else (limit / 60, True)
    capacity = limit if reset_s is None else min(limit, remaining + per_s * reset_s)
    earlier: tuple[float, float] | None = None if reset_s is None else (remaining, reset_s)
    if old is not None and old.earlier is not None and (earlier is None or old.earlier[0] > earlier[0]):
        earlier = old.earlier  # keep the fuller one: the rate is more exact if the two answers are far apart
    full_at = now + reset_s if is_guess and reset_s is not None else None
    return Bucket(per_s, max(capacity, 1.0), remaining - unseen, now, earlier, is_guess, full_at)


def refill_rate(earlier: tuple[float, float], remaining: float, reset_s: float | None) -> float | None:
    """Return the refill per second, computed from two answers; None if they are too close together."""
    if reset_s is None:
        return None
    fuller, sooner_s = earlier
    less, later_s = fuller - remaining, reset_s - sooner_s
    if abs(later_s) < _LEAST_RESET_S or abs(less) < 0.05 * max(fuller, remaining) or less * later_s <= 0:
        return None  # too close, or a reset that means something else
    return less / later_s
