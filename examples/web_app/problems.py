"""Errors of the library to answers of HTTP: one table, and what a client may know."""

from __future__ import annotations

import logging
import math

from fastapi import Request
from fastapi.responses import JSONResponse

from asyncembed import (
    AsyncEmbedError,
    DeadlineError,
    InputError,
    OverloadedError,
    ProviderError,
    SinkBusyError,
    SinkError,
)

log = logging.getLogger(__name__)

# The first that fits counts, so the narrower kind stands before the wider one.
_ANSWERS: tuple[tuple[type[AsyncEmbedError], int, str], ...] = (
    (OverloadedError, 503, "Too many are searching at once. Try again."),
    (DeadlineError, 504, "This took too long. Try again."),
    (ProviderError, 502, "The embedding service does not answer as it should. Try again later."),
    (SinkBusyError, 503, "The store is busy. Try again."),
    (SinkError, 503, "The store does not answer as it should. Try again later."),
    (AsyncEmbedError, 500, "Something went wrong."),
)


async def answer(request: Request, error: Exception) -> JSONResponse:
    """Tell the client what it can act on, and the log the rest: the library's messages hold no text and no key."""
    assert isinstance(error, AsyncEmbedError)
    if isinstance(error, InputError):  # the client's own mistake, so it is told which
        return JSONResponse({"detail": str(error)}, 422)
    log.warning("%s: %s: %s", request.url.path, type(error).__name__, error)
    status, detail = next((status, detail) for kind, status, detail in _ANSWERS if isinstance(error, kind))
    # whole seconds, at least one (RFC 9110, 10.2.3); who tells no time is asked again soon
    wait_s = max(1, math.ceil(getattr(error, "retry_after_s", None) or 0))
    return JSONResponse({"detail": detail}, status, {"retry-after": str(wait_s)} if status == 503 else None)
