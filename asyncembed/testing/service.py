"""Decides how a request is answered. It never waits; `now_s` is passed in."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .dialects import Dialect, Wording
from .faults import Fault
from .http import HTTPRequest
from .rate_limits import ServerRateLimits, Unit
from .replies import (
    JSON,
    Answer,
    CountTokens,
    ParsedRequest,
    RefusedRequestError,
    check,
    error_answer,
    parse_request,
    rate_error,
    reply_to,
    wrong_key,
)
from .vectors import size_of

_PATH = re.compile(r"(?:/openai)?(?:/v1)?/embeddings|/openai/deployments/(?P<model>[^/]+)/embeddings")

_NO_KEY = Wording(
    401,
    "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth "
    "(i.e. Authorization: Bearer YOUR_KEY).",
)


@dataclass(slots=True)
class EmbeddingService:
    """The rules of one server.

    Attributes:
        dialect: Limits, wordings and shapes of replies.
        dimensions: The size of all vectors; None for each model's own.
        models: The models that exist; None accepts any.
        api_key: The only valid key; None accepts any.
        rates: The rate limits.
    """

    dialect: Dialect
    dimensions: int | None
    models: Sequence[str] | None
    api_key: str | None
    rates: ServerRateLimits

    def read(self, http: HTTPRequest, count_tokens: CountTokens) -> ParsedRequest | Wording:
        """Parse a request; return the error if it cannot be parsed. Blocks for some milliseconds if it is large."""
        path = _PATH.fullmatch(http.path)
        try:
            return parse_request(http.body, count_tokens, path and path["model"])
        except RefusedRequestError as refused:
            return refused.error

    def admit(self, http: HTTPRequest, parsed: ParsedRequest | Wording, now_s: float) -> ParsedRequest:
        """Check a request, and take its cost from the rate limits.

        The order is the API's: path, key, requests per minute, the request itself, tokens per minute. So a refused
        request counts as a request, but its tokens do not count.

        Raises:
            RefusedRequestError: With the error to answer.
        """
        _check_address(http)
        self._check_key(http)
        self._take("requests", 1, "all models" if isinstance(parsed, Wording) else parsed.model, now_s)
        if isinstance(parsed, Wording):
            raise RefusedRequestError(parsed)
        check(parsed, self.dialect, self._size(parsed), self.models)
        self._take("tokens", parsed.weight, parsed.model, now_s)
        return parsed

    def answer(self, request: ParsedRequest, fault: Fault) -> Answer:
        """Return the vectors, altered by the fault. Blocks for some milliseconds if there are many."""
        return Answer(200, fault.alter(reply_to(request, self.dialect, self._size(request))).encode(), JSON)

    def refuse(self, refused: RefusedRequestError) -> Answer:
        """Return the answer for a refused request."""
        headers: dict[str, str] = {}
        if refused.wait_s is not None and self.dialect.retry_after:
            headers["retry-after-ms"] = str(math.ceil(refused.wait_s * 1000))
            headers["retry-after"] = str(math.ceil(refused.wait_s))
        return error_answer(refused.error, self.dialect, headers)

    def headers(self, now_s: float) -> dict[str, str]:
        """Return the rate limit headers, if the dialect sends them."""
        return self.rates.headers(now_s) if self.dialect.rate_headers else {}

    def _size(self, request: ParsedRequest) -> int:
        return self.dimensions or size_of(request.model)

    def _check_key(self, http: HTTPRequest) -> None:
        if self.api_key is None:
            return
        scheme, _, bearer = http.headers.get("authorization", "").partition(" ")
        key = http.headers.get("api-key") or (bearer if scheme.lower() == "bearer" else "")
        if key != self.api_key:
            raise RefusedRequestError(wrong_key(key) if key else _NO_KEY)

    def _take(self, unit: Unit, amount: int, model: str, now_s: float) -> None:
        exceeded = self.rates.take(unit, amount, now_s)
        if exceeded is not None:
            raise RefusedRequestError(rate_error(exceeded, model), exceeded.wait_s)


def _check_address(http: HTTPRequest) -> None:
    if not _PATH.fullmatch(http.path):
        raise RefusedRequestError(Wording(404, f"Invalid URL ({http.method} {http.path})"))
    if http.method != "POST":
        message = f"Not allowed to {http.method} on {http.path}."
        raise RefusedRequestError(Wording(405, message, code="method_not_supported"))
