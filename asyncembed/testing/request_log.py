"""The log of a server: one frozen value per request."""

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
        number: Counted from 1, in the order of arrival.
        time_s: The time of arrival, on the clock of `time.monotonic()` and of the event loop.
        path: The path without the query.
        headers: Names in lower case. The API key is among them.
        model: The model; empty if the body could not be parsed, and then the numbers below are 0.
        texts: The inputs; empty with `keep_texts=False`.
        inputs: The number of inputs.
        tokens: The tokens of all inputs.
        estimated_tokens: The sum of ⌈UTF-8 bytes / 4⌉ of the inputs.
        dimensions: The requested dimensions, or None.
        base64: Whether base64 was requested.
        fault: The fault that the schedule gave, or None.
        status: The HTTP status of the answer; None as long as the answer is not completely sent.
        billed_tokens: The usage in the reply; 0 if nothing was embedded.
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
        """The larger of tokens and estimate, which limits and rate limits count."""
        return max(self.tokens, self.estimated_tokens)


class RequestLog:
    """All requests of one server, and the numbers of those in flight."""

    def __init__(self) -> None:
        self._requests: dict[int, LoggedRequest] = {}
        self._active: set[int] = set()
        self._arrived = 0
        self._changed = asyncio.Event()
        self.max_in_flight = 0

    @property
    def requests(self) -> list[LoggedRequest]:
        """All requests, in the order of arrival."""
        return list(self._requests.values())

    @property
    def in_flight(self) -> int:
        """The number of requests in flight."""
        return len(self._active)

    def next_number(self) -> int:
        """Return the next request's number: 1, 2, 3 and so on, also after `clear`."""
        self._arrived += 1
        return self._arrived

    def begin(self, request: LoggedRequest) -> None:
        """Add a request; from now on it is in flight."""
        self._requests[request.number] = request
        self._active.add(request.number)
        self.max_in_flight = max(self.max_in_flight, len(self._active))
        self._notify()

    def change(self, number: int, **values: Any) -> None:
        """Change fields of a request; do nothing if the log was cleared since it arrived."""
        if number in self._requests:
            self._requests[number] = replace(self._requests[number], **values)

    def answered(self, number: int, status: int) -> None:
        """Set the status of a request whose last bytes are about to be sent, and end it."""
        self.change(number, status=status)
        self.end(number)

    def end(self, number: int) -> None:
        """Mark a request as no longer in flight, answered or not."""
        self._active.discard(number)
        self._notify()

    async def change_of_state(self) -> None:
        """Wait until the next time that a request begins or ends."""
        await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def clear(self) -> None:
        """Delete all requests; those in flight still count as in flight."""
        self._requests.clear()
        self.max_in_flight = len(self._active)
