"""Request and token rates: buckets that refill all the time, and the headers that tell of them. Told the time; pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Unit: TypeAlias = Literal["requests", "tokens"]


@dataclass(slots=True)
class TokenBucket:
    """One rate.

    Args:
        per_minute: How much flows in a minute.
        capacity: How much the bucket holds.
        filled: The share of that which is in it at the start, from 0 to 1.
    """

    per_minute: float
    capacity: float
    filled: float = 1.0
    _level: float = field(default=0.0, init=False)
    _seen_s: float | None = field(default=None, init=False)

    def level(self, now_s: float) -> float:
        """Return how much is in it; `now_s` never goes back."""
        if self._seen_s is None:
            self._level = self.capacity * self.filled
        else:
            flown = (now_s - self._seen_s) * self.per_minute / 60
            self._level = min(self.capacity, self._level + flown)
        self._seen_s = now_s
        return self._level

    def take(self, amount: float, now_s: float) -> float:
        """Take the amount and return 0.0, or take nothing and return the seconds until it is there."""
        missing = amount - self.level(now_s)
        if missing > 0:
            return missing * 60 / self.per_minute
        self._level -= amount
        return 0.0

    def full_in_s(self, now_s: float) -> float:
        """Return the seconds until the bucket is full, if nothing more is taken."""
        return (self.capacity - self.level(now_s)) * 60 / self.per_minute


@dataclass(frozen=True, slots=True)
class Exceeded:
    """A rate that a request would exceed. `wait_s` is None if no wait helps: it is more than the bucket holds."""

    unit: Unit
    limit: int
    used: int
    requested: int
    wait_s: float | None


class ServerRateLimits:
    """The rates of one server.

    Args:
        requests_per_minute: None for no such rate.
        tokens_per_minute: None for no such rate.
        burst_s: How many seconds of flow a bucket holds.
        filled: How full the buckets are when the first request comes, from 0 to 1.
    """

    def __init__(
        self, requests_per_minute: float | None, tokens_per_minute: float | None, burst_s: float, filled: float = 1.0
    ) -> None:
        given: dict[Unit, float | None] = {"requests": requests_per_minute, "tokens": tokens_per_minute}
        self._buckets = {
            unit: TokenBucket(rate, rate * burst_s / 60, filled) for unit, rate in given.items() if rate is not None
        }

    def take(self, unit: Unit, amount: int, now_s: float) -> Exceeded | None:
        """Take the amount and return None, or take nothing and return what was exceeded."""
        bucket = self._buckets.get(unit)
        if bucket is None:
            return None
        used = bucket.capacity - bucket.level(now_s)
        wait_s = bucket.take(amount, now_s)
        if not wait_s:
            return None
        hopeless = amount > bucket.capacity
        return Exceeded(unit, int(bucket.capacity), int(used), amount, None if hopeless else wait_s)

    def headers(self, now_s: float) -> dict[str, str]:
        """Return `x-ratelimit-{limit,remaining,reset}-{requests,tokens}` for the rates there are."""
        found: dict[str, str] = {}
        for unit, bucket in self._buckets.items():
            found[f"x-ratelimit-limit-{unit}"] = str(int(bucket.per_minute))
            found[f"x-ratelimit-remaining-{unit}"] = str(int(bucket.level(now_s)))
            found[f"x-ratelimit-reset-{unit}"] = go_duration(bucket.full_in_s(now_s))
        return found


def go_duration(seconds: float) -> str:
    """Write a duration as Go does and the API's headers and messages: `0s`, `17ms`, `1.5s`, `6m0s`, `1h2m0s`."""
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
