"""Which request meets which fault. A schedule is asked once for every request, in the order in which they arrived.

All of them are deterministic: the same requests in the same order meet the same faults.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeAlias

from .bad_responses import Disconnect, NaNVector, Reset, Shuffled, TruncatedJSON, WrongCount
from .faults import Fault, HTMLError, InvalidInput, Overloaded, RateLimited, ServerFault
from .request_log import LoggedRequest

Schedule: TypeAlias = Callable[[LoggedRequest], Fault | None]
"""Returns the fault which a request meets, None for none. Any function will do."""

# Faults that pass by themselves: a client that retries gets through all of them.
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
    """Give the next requests these faults, one each in order, None for none; all further ones get `then`."""
    rest = iter(faults)
    return lambda request: next(rest, then)


def every(n: int, fault: Fault) -> Schedule:
    """Give every n-th request the fault: the n-th, the 2n-th, and so on."""
    if n < 1:
        raise ValueError(f"n is {n}; it is at least 1")
    return lambda request: None if request.number % n else fault


def mixed(*, rate: float, faults: Sequence[Fault] = PASSING, seed: int = 0) -> Schedule:
    """Give a share of the requests, `rate` from 0 to 1, one of the faults each, as the seed will have it."""
    dice = random.Random(seed)
    return lambda request: dice.choice(faults) if dice.random() < rate else None


def poison(texts: str | Collection[str] | Callable[[str], bool], fault: Fault | None = None) -> Schedule:
    """Give every request that holds such a text the fault, `InvalidInput()` if none is named.

    Args:
        texts: The text, the texts, or a function that knows them.
        fault: What the whole request gets.
    """
    answer = fault or InvalidInput()
    if isinstance(texts, str):
        texts = [texts]
    bad = texts if callable(texts) else frozenset(texts).__contains__
    return lambda request: answer if any(bad(text) for text in request.texts) else None


def outage(seconds: float, fault: Fault, after: int = 0) -> Schedule:
    """Give the fault to all requests for some seconds, which begin when request number `after` + 1 arrives."""
    begins_s: list[float] = []

    def schedule(request: LoggedRequest) -> Fault | None:
        if request.number > after and not begins_s:
            begins_s.append(request.time_s)
        return fault if begins_s and request.time_s < begins_s[0] + seconds else None

    return schedule


def first_of(*schedules: Schedule) -> Schedule:
    """Ask all of the schedules and take the first fault; each of them counts every request."""

    def schedule(request: LoggedRequest) -> Fault | None:
        found = [ask(request) for ask in schedules]
        return next((fault for fault in found if fault is not None), None)

    return schedule
