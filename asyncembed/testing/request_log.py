"""What a server was asked: one frozen value a request."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .faults import Fault


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """One request.

    Attributes:
        number: Counted from 1, in the order in which they arrived.
        time_s: When, on the clock of `time.monotonic()` and of the event loop.
        path: Without the query.
        headers: Names in lower case. The key is among them.
        model: The model; empty if the request could not be understood, and then the numbers below are 0.
        texts: The inputs; empty if the server was told not to keep them.
        inputs: How many there are.
        tokens: Their tokens.
        estimated_tokens: The sum of their ⌈UTF-8 bytes / 4⌉.
        dimensions: As asked for, or None.
        base64: Whether base64 was asked for.
        fault: What the schedule gave it.
        status: What was answered; None until the whole answer has been sent, and for ever if it never was.
        billed_tokens: What its reply says was used; 0 if nothing was embedded.
    """

    number: int
    time_s: float
    path: str
    headers: Mapping[str, str] = field(repr=False)
    model: str = ""
    texts: tuple[str, ...] = field(default=(), repr=False)
    inputs: int = 0
    tokens: int = 0
    estimated_tokens: int = 0
    dimensions: int | None = None
    base64: bool = False
    fault: Fault | None = None
    status: int | None = None
    billed_tokens: int = 0

    @property
    def weight(self) -> int:
        """What the limits and rates count: the tokens or their estimate, whichever is more."""
        return max(self.tokens, self.estimated_tokens)


class RequestLog:
    """The requests of one server, and which of them are being answered."""

    def __init__(self) -> None:
        self._requests: dict[int, LoggedRequest] = {}
        self._active: set[int] = set()
        self._arrived = 0
        self._changed = asyncio.Event()
        self.max_in_flight = 0

    @property
    def requests(self) -> list[LoggedRequest]:
        """All of them, in the order in which they arrived."""
        return list(self._requests.values())

    @property
    def in_flight(self) -> int:
        """How many are being answered."""
        return len(self._active)

    def next_number(self) -> int:
        """Number a request: 1, 2, 3 and so on, also after `clear`."""
        self._arrived += 1
        return self._arrived

    def begin(self, request: LoggedRequest) -> None:
        """Add a request, which is in flight from now on."""
        self._requests[request.number] = request
        self._active.add(request.number)
        self.max_in_flight = max(self.max_in_flight, len(self._active))
        self._tell()

    def change(self, number: int, **values: Any) -> None:
        """Set values of a request, unless the log was cleared since it arrived."""
        if number in self._requests:
            self._requests[number] = replace(self._requests[number], **values)

    def answered(self, number: int, status: int) -> None:
        """Its answer is about to be whole: from now on it is not in flight."""
        self.change(number, status=status)
        self.end(number)

    def end(self, number: int) -> None:
        """It is over, answered or not."""
        self._active.discard(number)
        self._tell()

    async def change_of_state(self) -> None:
        """Wait until a request begins or ends."""
        await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def clear(self) -> None:
        """Forget all requests; those in flight stay in flight."""
        self._requests.clear()
        self.max_in_flight = len(self._active)
