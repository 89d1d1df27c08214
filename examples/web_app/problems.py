"""Maps errors of the library to HTTP responses that show nothing internal."""

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

# The first match is used, so a subclass precedes its base class.
_ANSWERS: tuple[tuple[type[AsyncEmbedError], int, str], ...] = (
    (OverloadedError, 503, "Too many searches at once. Try again."),
    (DeadlineError, 504, "The request took too long. Try again."),
    (ProviderError, 502, "The embedding service has failed. Try again later."),
    (SinkBusyError, 503, "The store is busy. Try again."),
    (SinkError, 503, "The store has failed. Try again later."),
    (AsyncEmbedError, 500, "Something went wrong."),
)


async def answer(request: Request, error: Exception) -> JSONResponse:
    """Return a response that the client can act on; log the details, which contain no text and no key."""
    assert isinstance(error, AsyncEmbedError)
    if isinstance(error, InputError):  # the client's own mistake, so the client gets the message
        return JSONResponse({"detail": str(error)}, 422)
    log.warning("%s: %s: %s", request.url.path, type(error).__name__, error)
    status, detail = next((status, detail) for kind, status, detail in _ANSWERS if isinstance(error, kind))
    # whole seconds (RFC 9110, 10.2.3), one if the error names no time
    wait_s = max(1, math.ceil(getattr(error, "retry_after_s", None) or 0))
    return JSONResponse({"detail": detail}, status, {"retry-after": str(wait_s)} if status == 503 else None)
