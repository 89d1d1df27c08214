"""The server's rate limits: token buckets that refill continuously, and their headers. Pure: `now_s` is passed in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Unit: TypeAlias = Literal["requests", "tokens"]


@dataclass(slots=True)
class TokenBucket:
    """One rate limit.

    Args:
        per_minute: How much is refilled in a minute.
        capacity: How much the bucket holds.
        filled: How full it starts, from 0 to 1.
    """

    per_minute: float
    capacity: float
    filled: float = 1.0
    _level: float = field(default=0.0, init=False)
    _seen_s: float | None = field(default=None, init=False)

    def level(self, now_s: float) -> float:
        """Return how much is available; `now_s` must not decrease between calls."""
        if self._seen_s is None:
            self._level = self.capacity * self.filled
        else:
            refilled = (now_s - self._seen_s) * self.per_minute / 60
            self._level = min(self.capacity, self._level + refilled)
        self._seen_s = now_s
        return self._level

    def take(self, amount: float, now_s: float) -> float:
        """Take the amount and return 0.0, or take nothing and return the seconds until the amount is available."""
        missing = amount - self.level(now_s)
        if missing > 0:
            return missing * 60 / self.per_minute
        self._level -= amount
        return 0.0

    def full_in_s(self, now_s: float) -> float:
        """Return the seconds until the bucket is full again."""
        return (self.capacity - self.level(now_s)) * 60 / self.per_minute


@dataclass(frozen=True, slots=True)
class Exceeded:
    """A rate limit that a request would exceed. `wait_s` is None if the request needs more than the bucket holds."""

    unit: Unit
    limit: int
    used: int
    requested: int
    wait_s: float | None


class ServerRateLimits:
    """The rate limits of one server.

    Args:
        requests_per_minute: None for no such limit.
        tokens_per_minute: None for no such limit.
        burst_s: A bucket holds the refill of this many seconds.
        filled: How full the buckets are when the first request arrives, from 0 to 1.
    """

    def __init__(
        self, requests_per_minute: float | None, tokens_per_minute: float | None, burst_s: float, filled: float = 1.0
    ) -> None:
        given: dict[Unit, float | None] = {"requests": requests_per_minute, "tokens": tokens_per_minute}
        self._buckets = {
            unit: TokenBucket(rate, rate * burst_s / 60, filled) for unit, rate in given.items() if rate is not None
        }

    def take(self, unit: Unit, amount: int, now_s: float) -> Exceeded | None:
        """Take the amount and return None, or take nothing and return the exceeded limit."""
        bucket = self._buckets.get(unit)
        if bucket is None:
            return None
        used = bucket.capacity - bucket.level(now_s)
        wait_s = bucket.take(amount, now_s)
        if not wait_s:
            return None
        is_too_large = amount > bucket.capacity
        return Exceeded(unit, int(bucket.capacity), int(used), amount, None if is_too_large else wait_s)

    def headers(self, now_s: float) -> dict[str, str]:
        """Return `x-ratelimit-{limit,remaining,reset}-{requests,tokens}` for the limits that are set."""
        found: dict[str, str] = {}
        for unit, bucket in self._buckets.items():
            found[f"x-ratelimit-limit-{unit}"] = str(int(bucket.per_minute))
            found[f"x-ratelimit-remaining-{unit}"] = str(int(bucket.level(now_s)))
            found[f"x-ratelimit-reset-{unit}"] = go_duration(bucket.full_in_s(now_s))
        return found


def go_duration(seconds: float) -> str:
    """Format a duration as Go and the API's headers and messages do: `0s`, `17ms`, `1.5s`, `6m0s`, `1h2m0s`."""
    ms = max(0, round(seconds * 1000))
    if not ms:
        return "0s"
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest_ms = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest_ms / 1000:g}s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    return f"{hours}h{text}" if hours else text
