"""Schedules choose the fault of each request. They are called once per request, in the order of arrival.

All schedules here are deterministic: the same requests in the same order get the same faults.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeAlias

from .bad_responses import Disconnect, NaNVector, Reset, Shuffled, TruncatedJSON, WrongCount
from .faults import Fault, HTMLError, InvalidInput, Overloaded, RateLimited, ServerFault
from .request_log import LoggedRequest

Schedule: TypeAlias = Callable[[LoggedRequest], Fault | None]
"""A function that returns the fault of a request, or None."""

# Transient faults: a client that retries gets past all of them.
PASSING: tuple[Fault, ...] = (
    RateLimited(0.05, {"retry-after-ms": "50"}),
    ServerFault(500),
    HTMLError(502),
    Overloaded(),
    Disconnect("before"),
    Disconnect("mid-body"),
    Disconnect("after"),
    Reset(),
    TruncatedJSON(),
    WrongCount(-1),
    NaNVector(),
    Shuffled(),
)


def script(faults: Iterable[Fault | None], then: Fault | None = None) -> Schedule:
    """Give the next requests these faults in order, None for no fault; all later requests get `then`."""
    rest = iter(faults)
    return lambda request: next(rest, then)


def every(n: int, fault: Fault) -> Schedule:
    """Give every n-th request the fault: the n-th, the 2n-th, and so on."""
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    return lambda request: None if request.number % n else fault


def mixed(*, rate: float, faults: Sequence[Fault] = PASSING, seed: int = 0) -> Schedule:
    """Give a share of the requests, `rate` from 0 to 1, one of the faults each; the seed decides which."""
    dice = random.Random(seed)
    return lambda request: dice.choice(faults) if dice.random() < rate else None


def poison(texts: str | Collection[str] | Callable[[str], bool], fault: Fault | None = None) -> Schedule:
    """Give the fault to every request that contains a poisonous text.

    Args:
        texts: The text, the texts, or a function that returns whether a text is poisonous.
        fault: The fault of the whole request; None for `InvalidInput()`.
    """
    answer = fault or InvalidInput()
    if isinstance(texts, str):
        texts = [texts]
    bad = texts if callable(texts) else frozenset(texts).__contains__
    return lambda request: answer if any(bad(text) for text in request.texts) else None


def outage(seconds: float, fault: Fault, after: int = 0) -> Schedule:
    """Give the fault to all requests for `seconds`, starting when request number `after` + 1 arrives."""
    end_s: float | None = None

    def schedule(request: LoggedRequest) -> Fault | None:
        nonlocal end_s
        if request.number > after and end_s is None:
            end_s = request.time_s + seconds
        return fault if end_s is not None and request.time_s < end_s else None

    return schedule


def first_of(*schedules: Schedule) -> Schedule:
    """Call all schedules and use the first fault; every schedule sees every request."""

    def schedule(request: LoggedRequest) -> Fault | None:
        faults = [each(request) for each in schedules]
        return next((fault for fault in faults if fault is not None), None)

    return schedule
