"""Decides what to do after a failed attempt. Pure: it never sleeps and sends nothing.

An error and the batch's history become one of five actions: `Retry` after a while, `Probe` whether the provider is
down, `Split` the batch, `Reject` its only text, `Stop` the call. A batch that is refused for an unknown reason is split
if possible, so that unknown providers work, too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TypeAlias

from ..errors import (
    BadRequestError,
    FatalProviderError,
    ProtocolError,
    ProviderDownError,
    ProviderError,
    RateLimitedError,
    RequestError,
    ServerError,
    TooLargeError,
    TransportError,
)

# 0.5, 1, 2, 4, 8, 16, 30, 30 seconds, each times a random factor between 0.5 and 1: the first is what the
# openai SDK waits, the last is half of the minute in which OpenAI's buckets fill.
BACKOFF_BASE_S = 0.5
BACKOFF_MAX_S = 30.0

# After this many failures a batch is not sent again unchanged if other requests succeed: one of its texts may be the
# cause (Ollama answers 500 for certain sentences, llama.cpp for long ones). A single text gets more attempts, because
# it is lost if it is rejected: if 30 % of all requests fail by chance, 0.2 % of good texts fail 5 times.
SUSPECT_AFTER = 3
REJECT_AFTER = 5

# An overloaded server says nothing about the text: 503, by status or by code.
_OVERLOAD_CODES = {"server_is_overloaded", "overloaded", "slow_down"}

# If a provider refused this many single texts and accepted none, it refuses the request, not the texts.
REJECTIONS_BEFORE_STOP = 16


@dataclass(frozen=True, slots=True)
class Retry:
    """Send the same batch again after `after_s` seconds; if `shared`, all requests pause until then."""

    after_s: float
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Split:
    """Send the texts of the batch in smaller requests."""


@dataclass(frozen=True, slots=True)
class Reject:
    """Fail the only text of the batch. Other batches are not affected."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Send a single text to find out whether this batch is to blame or the provider is down, then decide again."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Send nothing new in this call."""

    error: FatalProviderError


Action: TypeAlias = Retry | Probe | Split | Reject | Stop


@dataclass(frozen=True, slots=True)
class History:
    """A batch's history when an attempt has failed.

    Attributes:
        inputs: Texts in the batch.
        failures: Attempts of this batch that failed, this one included.
        consecutive_failures: Of `failures`, the latest ones, between which no other request succeeded.
        healthy: Whether another request has succeeded since this batch first failed. A single text is lost if it is
            rejected, so for it only a success between its latest two failures, or after the latest one, counts.
        probed: Whether single texts were sent in its place, and failed, too.
        has_known_good: Whether a text is known that this provider has embedded.
        rejections: Single texts that the provider refused in this call before it accepted any.
        refusals: Rounds of rate-limit refusals, of any batch, since a request succeeded.
    """

    inputs: int
    failures: int
    consecutive_failures: int
    healthy: bool
    probed: bool = False
    has_known_good: bool = False
    rejections: int = 0
    refusals: int = 1


def is_overload(error: ProviderError) -> bool:
    """Return whether the provider is overloaded, so that fewer concurrent requests would help."""
    return isinstance(error, RateLimitedError) or error.status == 503 or error.code in _OVERLOAD_CODES


def decide(error: ProviderError, history: History, max_retries: int) -> Action:
    """Return what to do after a failed attempt. While nothing succeeds, a batch is sent again `max_retries` times."""
    if isinstance(error, FatalProviderError):
        return Stop(error)
    if isinstance(error, RateLimitedError):
        return _after_refusal(error, history, max_retries)
    if isinstance(error, (BadRequestError, TooLargeError)):
        return _split_or_reject(error, history)
    return _after_fault(error, history, max_retries)


def _split_or_reject(error: ProviderError, history: History) -> Action:
    if history.inputs > 1:
        return Split()
    if history.rejections >= REJECTIONS_BEFORE_STOP:
        why = f"{history.rejections} single texts were refused and none was accepted, so the request is at fault: "
        return _stop(RequestError, why, error)
    return Reject()


def _after_refusal(error: RateLimitedError, history: History, max_retries: int) -> Action:
    # While other requests succeed, a refused batch only has to wait for its turn.
    if history.consecutive_failures > max_retries:
        return _stop_as_down(error, history)
    if error.retry_after_s is None:
        return Retry(backoff_s(history.refusals), shared=True)
    # if a server asks for a few milliseconds each time, all attempts would otherwise be used up within a second
    grown_s = backoff_s(history.consecutive_failures - 1) if history.consecutive_failures > 1 else 0.0
    return Retry(max(error.retry_after_s, grown_s), shared=True)


def _after_fault(error: ProviderError, history: History, max_retries: int) -> Action:
    suspect_after = SUSPECT_AFTER if history.inputs > 1 else REJECT_AFTER
    if is_overload(error):
        suspect_after = max_retries + 1
    was_sent = not isinstance(error, TransportError) or error.connected  # else it says nothing about the texts
    if was_sent and history.failures >= min(suspect_after, max_retries + 1):
        if history.healthy:
            return _split_or_reject(error, history)
        if not history.probed and (history.has_known_good or (history.inputs > 1 and max_retries > 0)):
            return Probe()
    # A reply that is malformed every time stays malformed; an overloaded server or a lost connection may recover.
    limit = min(max_retries, suspect_after - 1) if isinstance(error, ProtocolError) else max_retries
    if history.consecutive_failures > limit:
        return _stop_as_down(error, history)
    if isinstance(error, TransportError) and not error.timed_out and history.failures == 1:
        return Retry(0.0)  # usually the server had closed an idle connection: a new one works
    stated = error.retry_after_s if isinstance(error, ServerError) else None
    return Retry(max(stated or 0.0, backoff_s(history.failures)), shared=stated is not None)


def backoff_s(failures: int) -> float:
    """Return the seconds to wait after this many failures: exponential, times a random factor from 0.5 to 1."""
    ceiling = min(BACKOFF_MAX_S, BACKOFF_BASE_S * 2.0 ** min(failures - 1, 16))
    return ceiling * random.uniform(0.5, 1.0)


def _stop_as_down(error: ProviderError, history: History) -> Stop:
    why = f"no request succeeded in {history.consecutive_failures} attempts; the last one: {type(error).__name__}: "
    return _stop(ProviderDownError, why, error)


def _stop(kind: type[FatalProviderError], why: str, error: ProviderError) -> Stop:
    reason = kind(f"{why}{error}", status=error.status, code=error.code, request_id=error.request_id)
    reason.__cause__ = error
    return Stop(reason)
