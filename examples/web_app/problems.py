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
    ProviderError,
    SinkBusyError,
    SinkError,
)

log = logging.getLogger(__name__)

# The first that fits counts, so the narrower kind stands before the wider one.
_ANSWERS: tuple[tuple[type[AsyncEmbedError], int, str], ...] = (
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
    retry_after_s = getattr(error, "retry_after_s", None) or 1.0
    headers = {"retry-after": str(math.ceil(retry_after_s))} if status == 503 else None
    return JSONResponse({"detail": detail}, status, headers)
