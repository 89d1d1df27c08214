"""Faults as values: here those that answer something else in place of vectors; `bad_responses` has the others.

A fault overrides one of three methods:

- `answer`: something else is answered: an error, a redirect, nonsense. Nothing is embedded or billed.
- `alter`: the vectors are made and billed, then altered.
- `send`: the answer is correct, but not delivered as it should be.

Your own fault is a subclass of `Fault` with one of these methods.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .dialects import INVALID_INPUT, OPENAI, Wording
from .http import Wire
from .rate_limits import Exceeded
from .replies import JSON, Answer, ServerReply, error_answer, rate_error, wrong_key


class Fault:
    """The base class of all faults. By itself it changes nothing."""

    def answer(self) -> Answer | None:
        """Return the answer that replaces the vectors; None to embed as usual."""
        return None

    def alter(self, reply: ServerReply) -> ServerReply:
        """Return the reply to send in place of the correct one."""
        return reply

    async def send(self, wire: Wire, answer: Answer) -> None:
        """Deliver the answer."""
        await wire.send(answer)


@dataclass(frozen=True, slots=True)
class Status(Fault):
    """Any HTTP answer.

    Args:
        status: The HTTP status.
        headers: Sent unchanged.
        body: Text, bytes, or a mapping that becomes JSON; None for an error body of OpenAI's shape.
        message: For that error body, as are `type` and `code`.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str | bytes | Mapping[str, object] | None = None
    message: str = "something went wrong"
    type: str | None = None
    code: str | None = None

    def answer(self) -> Answer:
        if self.body is None:
            return _error(Wording(self.status, self.message, self.type, self.code), self.headers)
        if isinstance(self.body, Mapping):
            return Answer(self.status, json.dumps(self.body).encode(), {**JSON, **self.headers})
        raw = self.body.encode() if isinstance(self.body, str) else self.body
        return Answer(self.status, raw, {"content-type": "text/plain", **self.headers})


def _error(wording: Wording, headers: Mapping[str, str] | None = None) -> Answer:
    return error_answer(wording, OPENAI, headers)


@dataclass(frozen=True, slots=True)
class RateLimited(Fault):
    """429 because of a rate limit. The message names the wait; headers may name it, too.

    Args:
        wait_s: Seconds in the message.
        headers: For instance `{"retry-after": "2"}`, `{"retry-after-ms": "250"}`, an HTTP date, or nonsense.
    """

    wait_s: float = 1.0
    headers: Mapping[str, str] = field(default_factory=dict)

    def answer(self) -> Answer:
        exceeded = Exceeded("tokens", limit=1_000_000, used=990_000, requested=70_000, wait_s=self.wait_s)
        return _error(rate_error(exceeded, "text-embedding-3-small"), self.headers)


@dataclass(frozen=True, slots=True)
class SlowDown(Fault):
    """429 `slow_down`: traffic grew too fast, though it is within the limits."""

    def answer(self) -> Answer:
        message = "Your traffic has increased too quickly. Please slow down your request rate and ramp up gradually."
        return _error(Wording(429, message, "rate_limit_error", "slow_down"))


@dataclass(frozen=True, slots=True)
class QuotaExceeded(Fault):
    """429 about money. `code` is one of `insufficient_quota`, `credit_balance_exhausted`,
    `organization_spend_limit_exceeded`, `project_spend_limit_exceeded`, `organization_usage_limit_exceeded`.
    """

    code: str = "insufficient_quota"

    def answer(self) -> Answer:
        message = (
            "You exceeded your current quota, please check your plan and billing details. For more information on "
            "this error, read the docs: https://platform.openai.com/docs/guides/error-codes/api-errors."
        )
        return _error(Wording(429, message, "insufficient_quota", self.code))


@dataclass(frozen=True, slots=True)
class InvalidKey(Fault):
    """401, as if the key had been revoked. The message shows a part of a key, as the API's does."""

    def answer(self) -> Answer:
        return _error(wrong_key("sk-revoked-0123456789"))


@dataclass(frozen=True, slots=True)
class Forbidden(Fault):
    """403: the country is not supported."""

    def answer(self) -> Answer:
        message = "Country, region, or territory not supported"
        return _error(Wording(403, message, "request_forbidden", "unsupported_country_region_territory"))


@dataclass(frozen=True, slots=True)
class InvalidInput(Fault):
    """400 for the whole request. It does not name the bad input."""

    def answer(self) -> Answer:
        return _error(INVALID_INPUT)


@dataclass(frozen=True, slots=True)
class TooManyTokens(Fault):
    """400 `max_tokens_per_request`: the server counts tokens differently from the client."""

    requested: int = 416_735

    def answer(self) -> Answer:
        return _error(OPENAI.too_large.fill(got=self.requested, limit=OPENAI.max_tokens_per_request))


@dataclass(frozen=True, slots=True)
class ServerFault(Fault):
    """500, or another 5xx status, with OpenAI's JSON error."""

    status: int = 500

    def answer(self) -> Answer:
        message = "The server had an error while processing your request. Sorry about that!"
        return _error(Wording(self.status, message, "server_error"))


@dataclass(frozen=True, slots=True)
class Overloaded(Fault):
    """503 `server_is_overloaded`. `retry_after` is the header's value; None leaves the header out."""

    retry_after: str | None = None

    def answer(self) -> Answer:
        wording = Wording(
            503,
            "The server is currently overloaded. Please try again later.",
            "service_unavailable_error",
            "server_is_overloaded",
        )
        return _error(wording, {} if self.retry_after is None else {"retry-after": self.retry_after})


@dataclass(frozen=True, slots=True)
class UnsupportedValue(Fault):
    """500 `unsupported value: NaN`, which Ollama answers to particular texts, every time (ollama issue 15582)."""

    def answer(self) -> Answer:
        return _error(Wording(500, "failed to encode response: json: unsupported value: NaN", "api_error"))


@dataclass(frozen=True, slots=True)
class HTMLError(Fault):
    """An HTML page from a proxy in front of the API: 502, 413, 520 to 529, or even 200."""

    status: int = 502

    def answer(self) -> Answer:
        page = f"<html><head><title>{self.status}</title></head><body><center>nginx</center></body></html>\r\n"
        return Answer(self.status, page.encode(), {"content-type": "text/html"})


@dataclass(frozen=True, slots=True)
class Redirect(Fault):
    """A redirect. A careful client does not follow it: that would send texts and API key elsewhere."""

    url: str
    status: int = 307

    def answer(self) -> Answer:
        return Answer(self.status, b"", {"location": self.url})


@dataclass(frozen=True, slots=True)
class ErrorBody200(Fault):
    """200 OK with an error in the body."""

    def answer(self) -> Answer:
        return replace(_error(Wording(500, "upstream failed", "server_error")), status=200)


@dataclass(frozen=True, slots=True)
class Garbage(Fault):
    """200 OK with any bytes: `b""`, `b"null"`, `b"[]"`, `b"[" * 100_000`, half a JSON document, invalid UTF-8."""

    body: bytes = b"\xff\xfe not JSON"
    content_type: str = "application/json"

    def answer(self) -> Answer:
        return Answer(200, self.body, {"content-type": self.content_type})
